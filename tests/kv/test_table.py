import numpy as np

from penstock.kv.table import COLUMNS_AT_START, ROWS_AT_START, BlockTables


def test_entries_without_a_block_are_zero():
    tables = BlockTables(2)
    row = tables.take_row()
    tables.write(1, row, 3, [7, 8])

    first, second = tables.gather([row], 6)

    assert first.tolist() == [[0, 0, 0, 0, 0, 0]]
    assert second.tolist() == [[0, 0, 0, 7, 8, 0]]
    assert first.dtype == np.int32


def test_rows_come_in_the_order_asked_for_and_as_a_copy():
    tables = BlockTables(1)
    rows = [tables.take_row() for _ in range(3)]
    for row in rows:
        tables.write(0, row, 0, [10 + row])

    (gathered,) = tables.gather([rows[2], rows[0]], 1)
    gathered[:] += 1

    assert gathered.tolist() == [[11 + rows[2]], [11 + rows[0]]]
    assert tables.gather(rows, 1)[0].tolist() == [[10 + row] for row in rows]


def test_no_rows_make_an_empty_table():
    assert BlockTables(1).gather([], 5)[0].shape == (0, 5)


def test_tables_grow_beyond_their_first_size_and_keep_what_they_have():
    tables = BlockTables(2)
    rows = [tables.take_row() for _ in range(3 * ROWS_AT_START)]
    assert len(set(rows)) == len(rows)
    tables.write(0, rows[0], 0, [5])
    tables.write(1, rows[-1], 0, range(10 * COLUMNS_AT_START))
    width = 12 * COLUMNS_AT_START

    first, second = tables.gather(rows, width)

    assert first.shape == second.shape == (len(rows), width)
    assert first[0, 0] == 5
    assert second[-1, : 10 * COLUMNS_AT_START].tolist() == list(range(10 * COLUMNS_AT_START))
    assert not second[-1, 10 * COLUMNS_AT_START :].any()


def test_a_row_is_clean_when_it_is_used_again():
    tables = BlockTables(2)
    row = tables.take_row()
    tables.write(0, row, 0, [1, 2, 3])
    tables.write(1, row, 2, [4])
    tables.give_row(row)

    assert tables.take_row() == row
    assert not any(table.any() for table in tables.gather([row], 8))


def test_cleared_entries_are_zero_and_their_neighbours_are_not():
    tables = BlockTables(1)
    row = tables.take_row()
    tables.write(0, row, 0, [1, 2, 3, 4])
    tables.clear(0, row, range(1, 3))

    assert tables.gather([row], 4)[0].tolist() == [[1, 0, 0, 4]]
