"""`Router`: puts requests to the policy, books what it chooses, and remembers why.

It owns the count of placements and the expected lengths of answers. Which rule chooses is the
policy's affair (`control/policies/`), who is up and how busy is the fleet's.
"""

from hashlib import blake2b
from typing import Final

from penstock.control.cost import F
from penstock.control.explain import Decision, Explanations
from penstock.control.fit import Float64
from penstock.control.fleet import CLOSED, Fleet
from penstock.control.lengths import OutputLengths
from penstock.control.policies import POLICIES, USES_DRAWS, USES_PREFIXES, Ask, Choice
from penstock.control.policies.policy import breaks_tpot, lacks_room, predict
from penstock.control.record import Booking, RequestRecord, WorkerRecord
from penstock.core.config import ControllerConfig
from penstock.core.errors import StartupFailed
from penstock.core.request import Request, RequestState
from penstock.core.types import NS_PER_MS, RequestId, WorkerId

TPOT_SHARE: Final = 0.9
"""Of the TPOT that is asked for, the part that steps may take: the rest is for what disturbs them,
such as blocks that arrive and sequences that turn out longer than expected.
"""
SPARE_MIN: Final = 0.02


class Router:
    """From a request to its workers.

    Raises: `StartupFailed` for a policy that there is not.
    """

    def __init__(self, config: ControllerConfig, fleet: Fleet) -> None:
        self.lengths = OutputLengths()
        self.explanations = Explanations()
        self._config = config
        self._fleet = fleet
        if config.policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise StartupFailed(f"--policy: {config.policy!r} is none of {known}")
        self._choose = POLICIES[config.policy]
        self._uses_prefixes = config.policy in USES_PREFIXES
        self._draws = config.policy in USES_DRAWS
        self._num_placed = 0

    def choose(self, record: RequestRecord, now_ns: int) -> tuple[Ask, Choice] | None:
        """Return what was asked and chosen, or None when nobody is open. Changes no book."""
        if not self._fleet.workers:
            return None
        waited_ns = now_ns - record.queued_ns
        ask = self._ask(record.request, record.output_token_ids, now_ns, waited_ns=waited_ns)
        choice = self._choose(self._fleet, ask)
        return None if choice is None else (ask, choice)

    def has_seat(self, request: Request, now_ns: int) -> bool:
        """True when some worker could decode a request, whether it could begin now or not."""
        fleet, ask = self._fleet, self._ask(request, [], now_ns, looks_up=False)
        closed = fleet.decode_closed if fleet.has_pairs else fleet.alone_closed
        step_ns = fleet.step + fleet.coefficients[F] * ask.num_tokens
        closed = closed + lacks_room(fleet, ask) + breaks_tpot(fleet, ask, step_ns)
        return bool((closed < CLOSED).any())

    def expected_ttft_ns(self, request: Request, now_ns: int) -> float | None:
        """Return what a request that came now would see; None when nobody is open."""
        if not self._fleet.workers:
            return None
        ask = self._ask(request, [], now_ns)
        choice = self._choose(self._fleet, ask)
        if choice is None:
            return None
        return predict(self._fleet, ask, choice.prefill, choice.decode).ttft_ns

    def assign(self, record: RequestRecord, ask: Ask, choice: Choice) -> Request:
        """Book a choice and begin the attempt; return the request to send."""
        fleet = self._fleet
        self._num_placed += 1
        prediction = predict(fleet, ask, choice.prefill, choice.decode)
        prefill, decode = fleet.at(choice.prefill), fleet.at(choice.decode)
        request = record.begin_attempt(prefill, decode)
        record.booking = Booking(
            prediction.prefill_ns,
            decode_tokens=record.request.num_tokens + record.request.params.max_tokens,
            kv_tokens=ask.num_tokens + ask.expected_output_tokens,
            context_tokens=ask.num_tokens + ask.expected_output_tokens // 2,
            arriving_tokens=0 if prefill is decode else record.num_tokens,
            arriving_bytes=fleet.link_bytes(prefill, decode, record.num_tokens),
        )
        self._book(record.booking, record, prefill, decode, ask.now_ns)
        if prefill is decode and fleet.has_pairs:
            self._note_stall(prefill, prediction.prefill_ns, ask)
        fleet.output_tokens += ask.expected_output_tokens
        self.explanations.note(
            Decision(
                record.request_id,
                self._config.policy,
                record.attempts,
                record.arrived_ns,
                ask,
                choice,
                fleet.names,
                prediction,
                record.expected_ns or prediction.ttft_ns + ask.now_ns - record.arrived_ns,
            )
        )
        return request

    def ask_to_go_on(self, record: RequestRecord, now_ns: int) -> Ask:
        """Return what a request asks for that decodes already."""
        return self._ask(record.request, record.output_token_ids, now_ns, looks_up=False)

    def steps_of_seats(self, ask: Ask) -> Float64:
        """Return the step of every worker that could decode a request within the TPOT that is usual
        or asked for, with it, [num_slots]; `CLOSED` and more for the others.
        """
        fleet = self._fleet
        steps: Float64 = fleet.step + fleet.coefficients[F] * ask.num_tokens
        is_slow = steps > ask.slo_tpot_ns * TPOT_SHARE
        return steps + fleet.decode_closed + lacks_room(fleet, ask) + is_slow * CLOSED

    def move(self, record: RequestRecord, to: WorkerRecord, now_ns: int) -> None:
        """Book a request that decodes on another worker from now on: where it is now is where its
        KV comes from.
        """
        booking, source = record.booking, record.decode
        assert booking is not None
        assert source is not None
        self.release(record, now_ns)
        record.been += record.holders
        record.prefill, record.decode, record.booking = source, to, booking
        source.num_requests += 1
        booking.arriving_tokens = record.num_tokens
        booking.arriving_bytes = self._fleet.link_bytes(source, to, record.num_tokens)
        self._book_decode(booking, record, to)

    def note_moved(self, record: RequestRecord, speaker: WorkerId) -> None:
        """Note that a request that moves is heard from where it was to go."""
        is_there = record.decode is not None and speaker == record.decode.info.worker_id
        if record.state is RequestState.HANDING_OFF and is_there:
            self.note_landed(record)
            record.move_to(RequestState.DECODING)

    def note_prefilled(self, record: RequestRecord, now_ns: int) -> None:
        """Take a prefill that is done off its worker's books."""
        booking, worker = record.booking, record.prefill
        if booking is None or worker is None or not booking.is_prefilling:
            return
        booking.is_prefilling = False
        self._fleet.landing_tokens += booking.arriving_tokens
        worker.num_prefills -= 1
        worker.prefill_tokens -= record.request.num_tokens
        worker.backlog_ns = worker.backlog_ns - booking.prefill_ns if worker.num_prefills else 0.0
        worker.free_at_ns = now_ns + worker.backlog_ns
        self._fleet.refresh_prefills(worker)

    def note_tokens(self, record: RequestRecord, num_tokens: int) -> None:
        """Note tokens that a request has got, which its worker holds from now on. The fleet's
        columns hear of it with whatever changes next on that worker, its next report at the latest:
        tokens come far too often to write them each time.
        """
        self.lengths.note_tokens(num_tokens)
        assert record.decode is not None
        record.decode.held_tokens += num_tokens

    def note_landed(self, record: RequestRecord) -> None:
        """Take a prompt whose KV has arrived off the books of what is on its way."""
        booking, decode = record.booking, record.decode
        if booking is None or decode is None or not booking.arriving_tokens:
            return
        decode.arriving_tokens -= booking.arriving_tokens
        decode.arriving_bytes -= booking.arriving_bytes
        if not decode.arriving_tokens:
            decode.arriving_bytes = 0.0
        if not record.been:  # what moves waits for nothing: it goes on where it was
            self._fleet.landing_tokens -= booking.arriving_tokens
            self._fleet.landed_tokens += booking.arriving_tokens
        booking.arriving_tokens = 0
        self._fleet.refresh_decodes(decode)

    def release(self, record: RequestRecord, now_ns: int) -> None:
        """Take all that a request has booked off again: it is over, or begins anew."""
        booking, prefill, decode = record.booking, record.prefill, record.decode
        if booking is None or prefill is None or decode is None:
            return
        self.note_prefilled(record, now_ns)
        self.note_landed(record)
        record.booking = None
        decode.num_decodes -= 1
        decode.decode_tokens -= booking.decode_tokens
        decode.kv_tokens -= booking.kv_tokens
        decode.held_tokens -= record.num_tokens
        decode.context_tokens -= booking.context_tokens
        decode.num_requests -= 1
        if prefill is not decode:
            prefill.num_requests -= 1
        self._fleet.refresh_decodes(decode)

    def _book(
        self,
        booking: Booking,
        record: RequestRecord,
        prefill: WorkerRecord,
        decode: WorkerRecord,
        now_ns: int,
    ) -> None:
        self._fleet.work_ns += booking.prefill_ns
        self._fleet.num_booked += 1
        prefill.num_prefills += 1
        prefill.prefill_tokens += record.request.num_tokens
        prefill.backlog_ns += booking.prefill_ns
        prefill.free_at_ns = max(prefill.free_at_ns, now_ns) + booking.prefill_ns
        self._fleet.refresh_prefills(prefill)
        if prefill is not decode:
            prefill.num_requests += 1
        self._book_decode(booking, record, decode)

    def _note_stall(self, worker: WorkerRecord, prefill_ns: float, ask: Ask) -> None:
        """Note a prompt on a worker that decodes: its sequences are behind, and catch up in what
        their steps leave of the TPOT.
        """
        budget_ns = ask.slo_tpot_ns * TPOT_SHARE
        spare = max(1 - self._fleet.step.item(worker.slot) / budget_ns, SPARE_MIN)
        worker.spare_at_ns = max(worker.spare_at_ns, ask.now_ns) + prefill_ns / spare
        self._fleet.refresh_prefills(worker)

    def _book_decode(self, booking: Booking, record: RequestRecord, decode: WorkerRecord) -> None:
        decode.arriving_tokens += booking.arriving_tokens
        decode.arriving_bytes += booking.arriving_bytes
        decode.num_decodes += 1
        decode.decode_tokens += booking.decode_tokens
        decode.kv_tokens += booking.kv_tokens
        decode.held_tokens += record.num_tokens
        decode.context_tokens += booking.context_tokens
        decode.num_requests += 1
        self._fleet.refresh_decodes(decode)

    def _ask(
        self,
        request: Request,
        output_token_ids: list[int],
        now_ns: int,
        *,
        looks_up: bool = True,
        waited_ns: int = 0,
    ) -> Ask:
        config = self._config
        cached = None
        if looks_up and self._uses_prefixes and self._fleet.index.num_blocks:
            token_ids = request.prompt_token_ids + tuple(output_token_ids)
            cached = self._fleet.cached_tokens(token_ids, request.root)
        slo_ttft_ms = request.slo_ttft_ms or config.slo_ttft_ms
        slo_tpot_ms = request.slo_tpot_ms or config.slo_tpot_ms
        num_output = len(output_token_ids)
        return Ask(
            num_tokens=len(request.prompt_token_ids) + num_output,
            expected_output_tokens=self.lengths.expect(request.params.max_tokens - num_output),
            cached_tokens=cached,
            draw=_draw(request.request_id) if self._draws else 0,
            turn=self._num_placed,
            now_ns=now_ns,
            slo_ttft_ns=(slo_ttft_ms or config.usual_ttft_ms) * NS_PER_MS,
            slo_tpot_ns=(slo_tpot_ms or config.usual_tpot_ms) * NS_PER_MS,
            waited_ns=waited_ns,
            tpot_bound_ns=slo_tpot_ms * TPOT_SHARE * NS_PER_MS if slo_tpot_ms else CLOSED,
        )


def _draw(request_id: RequestId) -> int:
    """Return 64 bits that look random and are the same in every run."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")
