"""Either worker killed at every state of a hand-off: the same tokens, no block lost, no hang."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from penstock.core.config import Handoff
from penstock.runtime import supervisor
from tests.cluster.client import Stream
from tests.faults.held import PROMPT_TOKENS, SEATS, STATES
from tests.faults.proxied import Site, a_site

State = Callable[[Site], AbstractAsyncContextManager[list[Stream]]]

HELD_BY_PUSH = {name: STATES[name] for name in ("prefilling", "offered")}
"""There is no link to stop a push on, and what has been written is decoded as what was pulled."""


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_killed_at_any_state_of_a_hand_off(victim: str, monkeypatch: pytest.MonkeyPatch):
    kill_at_every_state(victim, STATES, monkeypatch)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_killed_at_any_state_of_a_push(victim: str, monkeypatch: pytest.MonkeyPatch):
    options = {"transport": "shm", "handoff": Handoff.PUSH}
    kill_at_every_state(victim, HELD_BY_PUSH, monkeypatch, **options)


def kill_at_every_state(
    victim: str, states: dict[str, State], monkeypatch: pytest.MonkeyPatch, **options: object
) -> None:
    # So many deaths within seconds are what is wanted here, not a reason to give the worker up.
    monkeypatch.setattr(supervisor, "RESTARTS_PER_WINDOW", len(states))
    monkeypatch.setattr(supervisor, "RESTART_PAUSES_S", (0.0,) * len(states))

    with a_site(max_num_seqs=SEATS, **options) as tell:

        async def begin(site: Site) -> None:
            await site.undisturbed(PROMPT_TOKENS)
            await site.settle()

        tell(begin)
        for name, state in states.items():

            async def story(site: Site, name=name, state=state) -> None:
                retried = site.cluster.status().retried
                async with state(site) as streams:
                    site.kill(victim)
                await site.finish(streams)
                await site.settle()
                # A prefill worker is not needed any more by who decodes.
                is_over = (victim, name) == ("prefill-0", "decoding")
                assert (site.cluster.status().retried > retried) != is_over, name

            tell(story)
