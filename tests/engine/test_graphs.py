"""Which numbers of rows have graphs, and when one is captured."""

from penstock.engine.graphs import DecodeGraphs, EagerReplay, GraphKey, bucket_sizes


class Recorder:
    """Stands for what captures: notes in which order it is asked to."""

    def __init__(self) -> None:
        self.captured: list[str] = []

    def capture(self, run):
        run()
        return lambda: self.captured.append("replayed")


def make_graphs(capture, max_rows: int = 12) -> tuple[DecodeGraphs, list[int]]:
    runs: list[int] = []
    graphs = DecodeGraphs(
        capture,
        lambda rows: lambda: runs.append(rows),
        lambda rows: GraphKey(rows, (8 // rows,)),
        max_rows,
    )
    return graphs, runs


def test_sizes_are_small_numbers_and_multiples_of_eight():
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(3) == (1, 2, 4)
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert bucket_sizes(60) == bucket_sizes(64)
    assert bucket_sizes(1000)[-1] == 256


def test_a_batch_takes_the_least_that_fits():
    graphs, _ = make_graphs(EagerReplay())
    found = [graphs.rows_for(rows) for rows in (1, 2, 3, 5, 9, 16, 17)]
    assert found == [1, 2, 4, 8, 16, 16, None]


def test_all_are_captured_once_the_largest_first():
    recorder = Recorder()
    graphs, runs = make_graphs(recorder)
    graphs.warm_up()
    assert runs == [16, 8, 4, 2, 1]
    graphs.get(4)()
    graphs.get(4)()
    assert runs == [16, 8, 4, 2, 1]
    assert recorder.captured == ["replayed", "replayed"]


def test_without_cuda_the_step_itself_is_run():
    graphs, runs = make_graphs(EagerReplay())
    graphs.warm_up()
    assert runs == []
    graphs.get(2)()
    graphs.get(2)()
    assert runs == [2, 2]
