"""`Leases`: until when blocks are kept for a peer that says nothing."""

from collections.abc import Iterable

from penstock.core.events import Command, WakeAt
from penstock.transfer.session import Session

LEASE_KEY = "lease"


class Leases:
    """Begins, renews and ends the leases of sessions; who ends them owns them."""

    def __init__(self, lease_ns: int) -> None:
        self._lease_ns = lease_ns
        self._wakes_ns: int | None = None

    def begin(self, session: Session, now_ns: int) -> list[Command]:
        """Begin a lease; return the wish to be woken when it may end, if that is needed."""
        self.renew(session, now_ns)
        return self._wake(session.expires_ns)

    def renew(self, session: Session, now_ns: int) -> None:
        """Let it run for another lease from now on."""
        session.expires_ns = now_ns + self._lease_ns

    def over(self, sessions: Iterable[Session], now_ns: int) -> tuple[list[Session], list[Command]]:
        """Return the sessions whose lease is over, and the wish to be woken for the others."""
        self._wakes_ns = None
        over: list[Session] = []
        rest: list[Session] = []
        for session in sessions:
            (over if session.expires_ns <= now_ns else rest).append(session)
        return over, self._wake(min(s.expires_ns for s in rest)) if rest else []

    def _wake(self, at_ns: int) -> list[Command]:
        """Ask to be woken for the first lease that may end; one request at a time is enough."""
        if self._wakes_ns is not None and self._wakes_ns <= at_ns:
            return []
        self._wakes_ns = at_ns
        return [WakeAt(at_ns, LEASE_KEY)]
