"""The engine: one thread that loads the model and steps all sequences through it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog

from services.decoder.block_hash import BlockHasher
from services.decoder.engine_settings import EngineSettings
from services.decoder.errors import (
    DecoderError,
    EngineFailedError,
    ManagerUnavailableError,
    ShuttingDownError,
)
from services.decoder.kv_view import KvView, copy_tokens
from services.decoder.leases import (
    BlockSealed,
    ClaimsWanted,
    LeaseGranted,
    LeaseMessage,
    LeasePort,
    LeaseRefused,
    LeaseRevoked,
    ManagerAway,
    ManagerBack,
    PoolReady,
    SealRefused,
    SessionEnded,
)
from services.decoder.open_requests import OpenRequests
from services.decoder.request import (
    Admitted,
    DecodeRequest,
    Emit,
    Event,
    Failed,
    Finished,
    FinishReason,
    Token,
    TokenLogprobs,
)
from services.decoder.sampler import Sampled
from services.decoder.scheduler import LeaseError, Scheduler
from services.decoder.sequence import Chunk, Sequence, SequenceState, blocks_for
from services.decoder.step_buffers import StepBuffers
from services.decoder.step_meter import StepMeter
from services.decoder.step_model import LoadedModel, StepModel

__all__ = ["Engine", "EngineSettings", "LoadedModel", "StepModel"]

_log = structlog.get_logger()


@dataclass(frozen=True)
class _Submit:
    requests: tuple[DecodeRequest, ...]


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    drain_s: float


_Message = LeaseMessage | _Submit | _Abort | _Stop


class Engine:
    """Continuous batching over leased blocks. Every method may be called from any thread.

    Life cycle: `start` (blocking), `await leases.open()`, any number of `submit` and `abort`, `stop` (blocking), `await leases.close()`.
    """

    def __init__(
        self, build_model: Callable[[], LoadedModel], leases: LeasePort, settings: EngineSettings, emit: Emit
    ) -> None:
        self._build_model = build_model
        self._leases = leases
        self._settings = settings
        self._emit = emit
        self.meter = StepMeter()
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._loaded: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._busy_since: float | None = None
        self._open = OpenRequests(settings)
        # The engine's thread only.
        self._scheduler = Scheduler(settings, leases)
        self._buffers = StepBuffers(settings.max_num_batched_tokens)
        self._kv: KvView | None = None
        self._away: str | None = "the decoder has not reached its KV manager yet"
        self._sequences: dict[str, Sequence] = {}
        self._num_arrived = 0
        self._events: list[tuple[str, Event]] = []
        self._drain_deadline: float | None = None

    def start(self) -> None:
        """Starts the thread and returns when the model is loaded on it; raises what build_model raised (CheckpointError)."""
        self._thread.start()
        self._loaded.result()

    def submit(self, *requests: DecodeRequest) -> None:
        """Hands samples of one prompt over, all or none: for each, Admitted, Tokens and one Finished or Failed follow through `emit`.

        The first that runs computes the prompt, and the others take it over; each has a request_id of its own. Raises
        DuplicateRequestError while a request of one of the ids runs, ShuttingDownError after `stop` was called, InvalidRequestError
        for an empty prompt, NeverFitsError beyond kv_capacity and QueueFullError beyond max_waiting, unless they are resumed.
        """
        self._open.add(requests, lambda: self._inbox.put(_Submit(requests)))

    def require_room(self) -> None:
        """Raises what `submit` would refuse any new request with now: ShuttingDownError or QueueFullError."""
        self._open.require_room()

    def abort(self, request_id: str) -> bool:
        """Cancels a request at the next step boundary (Finished with CANCELLED follows); False: no such request runs."""
        found = request_id in self._open
        if found:
            self._inbox.put(_Abort(request_id))
        return found

    def stop(self, drain_s: float) -> None:
        """Refuses new requests, lets running ones end for up to drain_s seconds, fails the rest with ShuttingDownError, ends the thread.

        Every lease is handed to the port for release before it returns.
        """
        self._open.close()
        self._inbox.put(_Stop(drain_s))
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def num_preempted(self) -> int:
        """How often a sequence had to give its lease back and start over."""
        return self._scheduler.num_preempted

    @property
    def num_held_back(self) -> int:
        """How often a step left a sequence out that was too far ahead of its seals."""
        return self._scheduler.num_held_back

    def busy_ms(self) -> int | None:
        """How long the present step has lasted, in milliseconds; None when idle."""
        since = self._busy_since
        return None if since is None else int((time.monotonic() - since) * 1000)

    def _main(self) -> None:
        try:
            loaded = self._build_model()
            self._leases.bind(loaded.kv_geometry, self._inbox.put, self.busy_ms)
        except BaseException as error:  # whatever it is, `start` raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(loaded)
        stepped = False
        while True:
            self._drain(block=not stepped)
            if self._drain_deadline is not None and self._is_drained(self._drain_deadline):
                break
            stepped = self._turn(loaded.model)
        self._flush()

    def _turn(self, model: StepModel) -> bool:
        """One step, if anything can run; says whether something did."""
        chunks: list[Chunk] = []
        self.meter.begin()
        try:
            chunks = self._scheduler.plan()
            self.meter.mark("schedule")
            if chunks:
                self._busy_since = time.monotonic()
                self._step(model, chunks)
        except Exception as error:  # a step fails its own sequences only, and leaves no trace in the pool
            self.meter.fail()
            _log.exception("step_failed", requests=[chunk.sequence.log_ids for chunk in chunks])
            failure = EngineFailedError(f"a step of the engine failed: {type(error).__name__}: {error}")
            for chunk in chunks:
                self._fail(chunk.sequence, failure)
            if not chunks:
                self._fail_all(failure)
        finally:
            self._busy_since = None
            self.meter.end()
        return bool(chunks)

    def _step(self, model: StepModel, chunks: list[Chunk]) -> None:
        if self._kv is None:
            raise ValueError("a step was planned without a pool")
        meter = self.meter
        batch = self._buffers.fill(chunks, self._scheduler.block_size)
        meter.note_batch(chunks, len(batch.sample_rows))
        step = model.begin(batch, self._kv)
        # What the step before brought, now that something computes: the streams' thread takes the interpreter from this one.
        self._flush()
        meter.mark("fill")
        sampled = model.forward(step)
        meter.mark("forward")
        model.commit(step)
        meter.mark("commit")
        sampling = iter(range(len(batch.sample_rows)))
        for chunk in chunks:
            samples = chunk.reaches_end
            self._scheduler.computed(chunk)
            if samples:
                self._take_token(chunk.sequence, sampled, next(sampling))
        meter.mark("tokens")

    def _take_token(self, sequence: Sequence, sampled: Sampled, index: int) -> None:
        token_id, logprob = int(sampled.token_ids[index]), sampled.logprobs[index]
        logprobs = None
        if sequence.request.num_logprobs is not None and logprob is not None:
            logprobs = TokenLogprobs(token_id, logprob, sampled.top[index])
        self._event(sequence, Token(sequence.num_outputs, token_id, logprobs))
        sequence.append(token_id)
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _drain(self, block: bool) -> None:
        """Takes in everything that has arrived; with `block`, waits until something has, or the drain is over."""
        if block:
            self._flush()
            timeout = None
            if self._drain_deadline is not None:
                timeout = max(0.0, self._drain_deadline - time.monotonic())
            try:
                self._handle(self._inbox.get(timeout=timeout))
            except Empty:
                return
        while not self._inbox.empty():
            self._handle(self._inbox.get_nowait())

    def _handle(self, message: _Message) -> None:
        try:
            self._dispatch(message)
        except Exception as error:  # not known to concern one sequence only, so that none can be trusted
            _log.exception("engine_message_failed", message=type(message).__name__)
            self._fail_all(EngineFailedError(f"the engine failed: {type(error).__name__}: {error}"))

    def _dispatch(self, message: _Message) -> None:
        match message:
            case _Submit(requests):
                self._admit(requests)
            case _Abort(request_id):
                sequence = self._sequences.get(request_id)
                if sequence is not None:
                    self._finish(sequence, FinishReason.CANCELLED)
            case _Stop(drain_s):
                self._drain_deadline = time.monotonic() + drain_s
            case LeaseGranted() | LeaseRefused():
                self._take_answer(message)
            case LeaseRevoked(cache_id):
                self._scheduler.preempt(cache_id)
            case ClaimsWanted(answer):
                answer(self._scheduler.held())
            case ManagerAway(reason):
                self._away = reason
                self._scheduler.answers_seals = False
            case SessionEnded():
                self._scheduler.answers_seals = False
            case ManagerBack():
                self._away = None
                self._scheduler.answers_seals = True
            case BlockSealed():
                self._scheduler.sealed(message)
            case SealRefused():
                self._scheduler.seal_refused(message)
            case PoolReady():
                self._take_pool(message)

    def _take_pool(self, pool: PoolReady) -> None:
        self._away = None
        self._kv = pool.kv
        settings, loaded = self._settings, self._loaded.result()
        self._buffers.pin(settings.max_seqs, blocks_for(settings.kv_capacity, pool.block_size))
        hasher = None
        if pool.can_seal:
            hasher = BlockHasher(
                loaded.kv_geometry, loaded.numerics_id, pool.block_size, settings.shares_prefixes_between_tenants
            )
        self._scheduler.set_pool(pool.block_size, hasher)

    def _admit(self, requests: tuple[DecodeRequest, ...]) -> None:
        leader: Sequence | None = None
        for request in requests:
            sequence = Sequence(request, self._num_arrived, leader)
            self._num_arrived += 1
            self._sequences[request.request_id] = sequence
            self._scheduler.add(sequence)
            reason = sequence.finish_reason()
            if reason is not None:  # what was generated before already ends it
                self._event(sequence, Admitted(0, request.age_ticket))
                self._finish(sequence, reason)
            elif self._away is not None:
                self._fail(sequence, ManagerUnavailableError(self._away))
            elif leader is None:
                leader = sequence

    def _take_answer(self, answer: LeaseGranted | LeaseRefused) -> None:
        try:
            if isinstance(answer, LeaseRefused):
                self._scheduler.refused(answer)
                return
            granted = self._scheduler.granted(answer)
        except LeaseError as error:
            self._fail(error.sequence, error.error)
            return
        if granted is not None and granted[1]:
            sequence = granted[0]
            self._take_prompt(sequence)
            self._event(sequence, Admitted(sequence.num_computed, sequence.age_ticket, sequence.cache_id))

    def _take_prompt(self, sequence: Sequence) -> None:
        """Copies what its leader has computed of their prompt, and what their leases do not share: the partial block at its end."""
        leader, sequence.leader = sequence.leader, None
        start, end = sequence.num_computed, sequence.num_shareable
        # A leader that has ended, or starts over, has nothing to copy: the rest of the prompt is computed again.
        if leader is None or leader.num_computed < end or leader.state is not SequenceState.RUNNING or self._kv is None:
            return
        # Between two steps, when nobody writes either block, and the leader's rows are final: whole steps were committed.
        if start < end:
            copy_tokens(self._kv, leader.block_ids, sequence.block_ids, start, end)
            sequence.take_prompt(end)
            self._scheduler.seal_full(sequence)

    def _is_drained(self, deadline: float) -> bool:
        """Whether the thread may end; past the deadline the sequences that are left fail."""
        if time.monotonic() >= deadline:
            self._fail_all(ShuttingDownError("the decoder is shutting down"))
        return not self._sequences

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        stop_token_id = sequence.token_ids[-1] if reason is FinishReason.STOP else None
        cached = sequence.num_cached_tokens or 0
        self._end(sequence, Finished(reason, sequence.num_outputs, cached, stop_token_id))

    def _fail(self, sequence: Sequence, error: DecoderError) -> None:
        if sequence.state is not SequenceState.ENDED:
            self._end(sequence, Failed(error))

    def _fail_all(self, error: DecoderError) -> None:
        for sequence in list(self._sequences.values()):
            self._fail(sequence, error)

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        self._scheduler.remove(sequence)
        self._event(sequence, event)
        del self._sequences[sequence.request.request_id]

    def _event(self, sequence: Sequence, event: Event) -> None:
        self._events.append((sequence.request.request_id, event))

    def _flush(self) -> None:
        events, self._events = self._events, []
        if not events:
            return
        # Whoever hears of an end may use the id again at once; what comes of it then is emitted after this.
        ended = {request_id for request_id, event in events if isinstance(event, (Finished, Failed))}
        self._open.remove(ended)
        try:
            self._emit(events)
        except Exception:
            _log.exception("emit_failed", num_events=len(events))
