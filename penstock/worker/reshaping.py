"""`Reshaping`: what to pull of a request whose peer keeps its KV in blocks of another shape.

An offer comes in the peer's blocks, at once or part by part. It is tokens that are asked for and
counted: of each group one range that grows from part to part. Where a part ends in the middle of
one of our blocks, that block waits for the next part: it is filled once, and its digest taken then.
`PullDesk` makes one for an arrival from such a peer. Pure.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from penstock.core.block import KVLayout
from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.kv.group import Adopted

NO_BLOCKS: Final = GroupBlocks(0, ())
NOTHING: Final = Reshape(NO_BLOCKS, NO_BLOCKS, 0, 0)


class Reshaping:
    """The first `num_tokens` tokens on their way from `theirs` into `adopted` blocks of `ours`."""

    def __init__(
        self, theirs: KVLayout, ours: KVLayout, num_tokens: int, adopted: Sequence[Adopted]
    ) -> None:
        self._their_size = theirs.block_size
        self._our_size = ours.block_size
        self._num_tokens = num_tokens
        self._adopted = tuple(adopted)
        self._begins: list[int] = []
        for group, wanted in zip(ours.groups, adopted, strict=True):
            begin = min(wanted.destination_of, default=num_tokens) * ours.block_size
            seen = num_tokens - group.window + 1 if group.window else 0
            self._begins.append(min(max(begin, seen), num_tokens))
        self._reached = list(self._begins)
        self._left = [NO_BLOCKS] * len(self._begins)

    @property
    def is_whole(self) -> bool:
        """True when all that is needed has been asked for."""
        return all(reached == self._num_tokens for reached in self._reached)

    def ask(self, parts: Sequence[Sequence[GroupBlocks]]) -> tuple[Reshape, ...]:
        """Return what to bring over of parts that are ready, per group; note that it was asked."""
        groups = zip(*parts, strict=True)
        left = self._left
        return tuple(self._ask(i, _joined([left[i], *blocks])) for i, blocks in enumerate(groups))

    def _ask(self, index: int, offered: GroupBlocks) -> Reshape:
        destination_of = self._adopted[index].destination_of
        begin = max(
            offered.first * self._their_size,
            min(destination_of, default=self._num_tokens) * self._our_size,
        )
        end = (offered.first + len(offered.block_ids)) * self._their_size
        end = self._num_tokens if end >= self._num_tokens else end - end % self._our_size
        self._left[index] = _from(offered, max(begin, end) // self._their_size)
        if begin >= end:
            return NOTHING
        if begin <= self._reached[index]:
            self._reached[index] = max(self._reached[index], end)
        entries = range(begin // self._our_size, -(-end // self._our_size))
        ours = GroupBlocks(entries.start, tuple(destination_of[entry] for entry in entries))
        return Reshape(_from(offered, begin // self._their_size), ours, begin, end)


def _joined(parts: Sequence[GroupBlocks]) -> GroupBlocks:
    """Return parts of one group that follow on each other as one."""
    parts = [part for part in parts if part.block_ids]
    if not parts:
        return NO_BLOCKS
    # A peer that leaves a gap has what comes after it ignored, and is found to have given too few.
    ends = accumulate((len(part.block_ids) for part in parts), initial=parts[0].first)
    parts = [part for part, end in zip(parts, ends, strict=False) if part.first == end]
    has_digests = all(part.digests for part in parts)
    has_generations = all(part.generations for part in parts)
    return GroupBlocks(
        parts[0].first,
        tuple(i for part in parts for i in part.block_ids),
        tuple(d for part in parts for d in part.digests if has_digests),
        tuple(g for part in parts for g in part.generations if has_generations),
    )


def _from(blocks: GroupBlocks, entry: int) -> GroupBlocks:
    """Return the blocks from an entry of their table on."""
    start = entry - blocks.first
    return GroupBlocks(
        entry, blocks.block_ids[start:], blocks.digests[start:], blocks.generations[start:]
    )
