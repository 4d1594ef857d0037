"""A controller as a story: events in, what it said to whom out. Every event checks the books."""

from msgspec.structs import replace

from penstock.control.controller import Controller
from penstock.core.block import extend_hashes
from penstock.core.config import ControllerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Command, Event, Send, WakeAt, Woken, WorkerLost
from penstock.core.messages import (
    Assign,
    BlocksChanged,
    Hello,
    Load,
    Message,
    Offered,
    Submit,
    TokenOutput,
    Tokens,
)
from penstock.core.request import Request, SamplingParams
from penstock.core.step import StepSample
from penstock.core.types import NS_PER_MS, BlockHash, FinishReason, RequestId, Role, WorkerId
from penstock.sim.executor import chain_layout

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
H100 = "H100/llama3.1-8b/tp1"


class Story:
    """A controller, and what it said."""

    def __init__(self, *names: str, num_blocks: int = 16, **settings: object) -> None:
        self.now_ns = 0
        self.num_blocks = num_blocks
        self.said: list[tuple[WorkerId, Message]] = []
        self.wakes: list[WakeAt] = []
        self.controller = Controller(ControllerConfig(**settings))
        for name in names:
            self.join(name)
        self.said.clear()

    def tell(self, event: Event) -> None:
        self.now_ns += 1000
        commands: list[Command] = self.controller.handle(event, self.now_ns)
        self.controller.check()
        self.said += [(c.to, c.message) for c in commands if isinstance(c, Send)]
        self.wakes += [c for c in commands if isinstance(c, WakeAt)]

    def join(
        self,
        name: str,
        epoch: int = 1,
        block_size: int = 16,
        model: str = "chain",
        profile: str = H100,
        max_num_seqs: int = 8,
        host: str = "",
    ) -> None:
        info = WorkerInfo(
            worker_id=WorkerId(name),
            role=ROLES[name[0]],
            epoch=epoch,
            address="",
            pid=0,
            layout=replace(chain_layout(block_size), model=model),
            num_blocks=(self.num_blocks,),
            max_model_len=200,
            max_num_seqs=max_num_seqs,
            profile=profile,
            host=host,
        )
        self.tell(Hello(info=info))

    def lose(self, name: str, epoch: int = 1) -> None:
        self.tell(WorkerLost(worker_id=WorkerId(name), epoch=epoch, reason="killed"))

    def submit(self, name: str, num_prompt: int = 20, **more: object) -> None:
        self.tell(Submit(request=request(name, num_prompt, **more)))

    def tokens(self, worker: str, name: str, token_id: int, *, is_last: bool = False) -> None:
        reason = FinishReason.LENGTH if is_last else None
        output = TokenOutput(RequestId(name), (token_id,), finish_reason=reason)
        self.tell(Tokens(worker_id=WorkerId(worker), outputs=(output,)))

    def grow(self, worker: str, name: str, num_tokens: int) -> None:
        """Let a request get many tokens at once, and its worker report a step."""
        output = TokenOutput(RequestId(name), tuple(range(num_tokens)))
        self.tell(Tokens(worker_id=WorkerId(worker), outputs=(output,)))
        step = StepSample(0, 0, 1, num_tokens, 5 * NS_PER_MS)
        self.tell(Load(WorkerId(worker), 0, 1, 0, (1,), (1,), step_samples=(step,)))

    def offered(self, worker: str, name: str) -> None:
        self.tell(Offered(request_id=RequestId(name), worker_id=WorkerId(worker)))

    def has_blocks(self, worker: str, num_tokens: int, epoch: int = 1) -> None:
        """Let a worker say that it has the blocks of a prompt's first tokens."""
        hashes: list[BlockHash] = []
        extend_hashes(hashes, list(range(num_tokens)), 16, "")
        changed = BlocksChanged(worker_id=WorkerId(worker), epoch=epoch, stored=tuple(hashes))
        self.tell(changed)

    def pass_time(self, ms: float, key: str) -> None:
        """Let some time go by, and ring."""
        self.now_ns += int(ms * NS_PER_MS)
        self.tell(Woken(key))

    def heard(self, kind: type[Message]) -> list[tuple[WorkerId, Message]]:
        """Return and forget what was said of one kind, and to whom."""
        found = [(to, message) for to, message in self.said if isinstance(message, kind)]
        self.said = [(to, message) for to, message in self.said if not isinstance(message, kind)]
        return found

    def pairs(self) -> list[tuple[str, str]]:
        """Return and forget the workers of the latest assignments."""
        return [(to, assign.decode_worker) for to, assign in self.heard(Assign)]


def request(name: str, num_prompt: int = 20, **more: object) -> Request:
    """Prompts are prefixes of each other."""
    max_tokens = more.pop("max_tokens", 10)
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens, seed=1),
        **more,
    )
