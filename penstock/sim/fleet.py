"""Which workers a simulated cluster has: `4xH100:prefill,4xH100:decode` as a list of workers.

An item is COUNTxGPU[-tpN][:ROLE]; without a role it is mixed, without tp it takes the fewest GPUs
that hold the model. Workers are named by role, as `penstock serve` names them: prefill-0, decode-0.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import BadRequest
from penstock.core.types import Role
from penstock.sim.profile import Hardware, find_hardware

_ITEM: Final = re.compile(r"(?:(\d+)[x*])?([a-z]+\d+[a-z]*)(?:-tp(\d+))?(?::(\w+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Member:
    """One worker of a simulated cluster, and the host that it sits on."""

    name: str
    role: Role
    hardware: Hardware
    host: int


@dataclass(frozen=True, slots=True)
class Pool:
    """So many workers of one kind, whatever their roles."""

    hardware: Hardware
    count: int


def parse_fleet(text: str, model: str, *, gpus_per_host: int = 8) -> tuple[Member, ...]:
    """Return the workers that `text` describes, as `make_fleet` places them.

    Raises: `BadRequest` saying what is wrong.
    """
    items = [_parse_item(item.strip(), model) for item in text.split(",")]
    return make_fleet(items, gpus_per_host=gpus_per_host)


def make_fleet(
    items: Iterable[tuple[Pool, Role, int]], *, gpus_per_host: int = 8
) -> tuple[Member, ...]:
    """Return `count` workers of each (pool, role, count), hosts filled in the order given.

    Workers of different GPUs never share a host.
    """
    members: list[Member] = []
    counts = dict.fromkeys(Role, 0)
    host, used_gpus, before = 0, 0, ""
    for pool, role, number in items:
        hardware = pool.hardware
        for _ in range(number):
            is_other = before not in ("", hardware.gpu)
            if used_gpus and (is_other or used_gpus + hardware.tp > gpus_per_host):
                host, used_gpus = host + 1, 0
            before, used_gpus = hardware.gpu, used_gpus + hardware.tp
            members.append(Member(f"{role.value}-{counts[role]}", role, hardware, host))
            counts[role] += 1
    return tuple(members)


def pools_of(members: tuple[Member, ...]) -> tuple[Pool, ...]:
    """Return how many workers of each kind there are, roles left out."""
    counts: dict[Hardware, int] = {}
    for member in members:
        counts[member.hardware] = counts.get(member.hardware, 0) + 1
    return tuple(Pool(hardware, count) for hardware, count in counts.items())


def describe_fleet(members: tuple[Member, ...]) -> str:
    """Return the text of `members`, as `parse_fleet` reads it."""
    counts: dict[tuple[str, int, Role], int] = {}
    for member in members:
        key = (member.hardware.gpu, member.hardware.tp, member.role)
        counts[key] = counts.get(key, 0) + 1
    return ",".join(f"{n}x{gpu}-tp{tp}:{role.value}" for (gpu, tp, role), n in counts.items())


def num_gpus(members: tuple[Member, ...]) -> int:
    """Return how many GPUs the workers have together."""
    return sum(member.hardware.tp for member in members)


def _parse_item(item: str, model: str) -> tuple[Pool, Role, int]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise BadRequest(
            f"{item!r} is not COUNTxGPU[-tpN][:ROLE], such as 4xH100:prefill", "cluster"
        )
    number, gpu, tp, role = match.groups()
    roles = {r.value: r for r in Role}
    if role is not None and role.lower() not in roles:
        raise BadRequest(f"{role!r} is not a role: {', '.join(roles)}", "cluster")
    count = int(number or 1)
    if not count:
        raise BadRequest(f"{item!r} has no workers", "cluster")
    hardware = find_hardware(gpu, model, int(tp) if tp else None)
    return Pool(hardware, count), roles[(role or "mixed").lower()], count
