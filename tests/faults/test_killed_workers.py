"""Either worker killed at every state of a hand-off: the same tokens, no block lost, no hang."""

import pytest

from penstock.runtime import supervisor
from tests.faults.held import PROMPT_TOKENS, SEATS, STATES
from tests.faults.proxied import Site, a_site


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_killed_at_any_state_of_a_hand_off(victim: str, monkeypatch: pytest.MonkeyPatch):
    # Four deaths within seconds are what is wanted here, not a reason to give the worker up.
    monkeypatch.setattr(supervisor, "RESTARTS_PER_WINDOW", len(STATES))
    monkeypatch.setattr(supervisor, "RESTART_PAUSES_S", (0.0,) * len(STATES))

    with a_site(max_num_seqs=SEATS) as tell:

        async def begin(site: Site) -> None:
            await site.undisturbed(PROMPT_TOKENS)
            await site.settle()

        tell(begin)
        for state in STATES.values():

            async def story(site: Site, state=state) -> None:
                retried = site.cluster.status().retried
                async with state(site) as streams:
                    site.kill(victim)
                await site.finish(streams)
                await site.settle()
                # A prefill worker is not needed any more by who decodes.
                is_over = (victim, state.__name__) == ("prefill-0", "decoding")
                assert (site.cluster.status().retried > retried) != is_over, state

            tell(story)
