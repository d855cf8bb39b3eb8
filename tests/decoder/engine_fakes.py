"""A model whose next token depends on every token that it reads back from the pool, and what drives an engine with it.

A wrong table, slot, context length or a foreign block changes the tokens, so a test that compares them sees it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protos.pool_format import BlockShape
from services.decoder.batch import Batch
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.errors import DecoderError
from services.decoder.kv_view import KvView
from services.decoder.leases import (
    AcquireAsk,
    BlockSealed,
    ExtendAsk,
    ForkAsk,
    KvGeometry,
    LeaseGranted,
    LeaseMessage,
    LeasePort,
    LeaseRefused,
    PoolReady,
    Post,
    SealAsk,
    SealRefused,
)
from services.decoder.request import Admitted, DecodeRequest, Event, Failed, Finished, SamplingParams, Token
from services.decoder.sampler import RowSampling, Sampled

VOCAB_SIZE = 1000
GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=4, kv_dtype="f32", model_fingerprint=bytes(32))
DEADLINE_S = 30.0


def next_token(history: Sequence[int], how: RowSampling) -> int:
    """What the fake model draws after `history`."""
    text = f"{list(history)} {how.params.seed} {how.sample_index} {how.position}"
    token_id = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % VOCAB_SIZE
    while token_id in how.banned_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def expected_tokens(request: DecodeRequest) -> list[int]:
    """All tokens that the request generates when it runs alone and undisturbed."""
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        banned = request.stop_token_ids if len(tokens) < request.min_tokens else frozenset()
        how = RowSampling(request.sampling, request.sample_index, len(tokens), None, banned_token_ids=frozenset(banned))
        tokens.append(next_token([*request.prompt_token_ids, *tokens], how))
        if len(tokens) >= request.min_tokens and tokens[-1] in request.stop_token_ids:
            break
    return tokens


class FakeKv:
    """Blocks in memory, poisoned."""

    kv_dtype = "f32"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.shape = BlockShape(1, 1, block_size, GEOMETRY.head_dim, 4)
        self._blocks = np.full((num_blocks, 1, 2, 1, block_size, GEOMETRY.head_dim), -1, np.float32)

    def block(self, block_id: int) -> Any:
        return self._blocks[block_id]

    def scales(self, block_id: int) -> Any:
        raise ValueError("only int8 K/V has scales")

    def block_bytes(self, block_id: int) -> Any:
        return self._blocks[block_id].view(np.uint8).ravel()

    def gather(self, block_ids: Any, layer: int, num_tokens: int | None = None) -> Any:
        return self._blocks[:, layer, :, :, :num_tokens][block_ids]

    def addresses(self, block_ids: Any) -> Any:
        raise NotImplementedError


@dataclass
class FakeStep:
    """What `begin` hands out."""

    batch: Batch
    kv: KvView


class FakeModel:
    """Stores each token's id as its K/V. `gate` can hold a step, `hold_at` and `hold_when` a certain one; `fail_when` can fail one."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []  # (sequences, tokens) of each committed step
        self.fail_when: Callable[[Batch], bool] = lambda batch: False
        self.hold_at: int | None = None  # the step that closes the gate on itself, counted from 0
        self.hold_when: Callable[[], bool] = lambda: False  # or the first of which this is true
        self.gate = threading.Event()
        self.gate.set()
        self.is_stepping = threading.Event()

    def begin(self, batch: Batch, kv: KvView) -> FakeStep:
        return FakeStep(batch, kv)

    def forward(self, step: FakeStep) -> Sampled:
        if len(self.batches) == self.hold_at or self.hold_when():
            self.hold_at, self.hold_when = None, lambda: False
            self.gate.clear()
        self.is_stepping.set()
        assert self.gate.wait(DEADLINE_S)
        self.is_stepping.clear()
        batch = step.batch
        if self.fail_when(batch):
            raise RuntimeError("the fake model was told to fail")
        tokens = [
            next_token(self._history(step, int(row)), how)
            for row, how in zip(batch.sample_rows, batch.sampling, strict=True)
        ]
        return Sampled(np.array(tokens, np.int32), [-0.5] * len(tokens), [[(7, -0.25)]] * len(tokens))

    def until_held(self) -> None:
        """Waits until a step stands before the closed gate."""
        poll(lambda: self.is_stepping.is_set() and not self.gate.is_set())

    def commit(self, step: FakeStep) -> None:
        size = step.kv.shape.block_size
        for token_id, slot in zip(step.batch.token_ids, step.batch.slot_mapping, strict=True):
            step.kv.block(int(slot) // size)[0, 0, 0, int(slot) % size, 0] = token_id
        self.batches.append((step.batch.num_seqs, step.batch.num_tokens))

    def _history(self, step: FakeStep, row: int) -> list[int]:
        batch, size = step.batch, step.kv.shape.block_size
        seq = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
        context = int(batch.context_lens[seq])
        history = [
            int(step.kv.block(int(batch.block_tables[seq, at // size]))[0, 0, 0, at % size, 0]) for at in range(context)
        ]
        start = int(batch.cu_seqlens[seq])
        assert list(batch.positions[start : row + 1]) == list(range(context, context + row + 1 - start))
        return history + [int(token_id) for token_id in batch.token_ids[start : row + 1]]


class PooledLeases:
    """A LeasePort over a pool in memory that answers at once, unless it is told to hold its answers back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.kv = FakeKv(num_blocks, block_size)
        self.block_size = block_size
        self.free = list(reversed(range(num_blocks)))
        self.tables: dict[int, list[int]] = {}
        self.log: list[tuple[str, int, int]] = []
        self.hold_extends = False
        self.hold_seals = False
        self.held_seals: list[SealAsk] = []
        self.refuse: Callable[[str, int], DecoderError | None] = lambda kind, cache_id: None
        self.post: Post = lambda message: None
        self.announce = True
        self.can_seal = False
        self.seals: list[SealAsk] = []
        self.acquires: list[AcquireAsk] = []
        self.forks: list[ForkAsk] = []
        self._holders: Counter[int] = Counter()  # of each block that is held
        self._next_ticket = 100

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        self.post = post
        if self.announce:
            post(PoolReady(self.kv, self.block_size, self.can_seal))

    def acquire(self, ask: AcquireAsk) -> None:
        self.acquires.append(ask)
        self.log.append(("acquire", ask.cache_id, ask.num_blocks))
        self._next_ticket += 1
        ticket = ask.age_ticket if ask.age_ticket is not None else self._next_ticket
        self._grow("acquire", ask.cache_id, ask.num_blocks, ticket)

    def extend(self, ask: ExtendAsk) -> None:
        self.log.append(("extend", ask.cache_id, ask.num_blocks))
        if not self.hold_extends:
            self._grow("extend", ask.cache_id, ask.num_blocks, None)

    def fork(self, ask: ForkAsk) -> None:
        self.forks.append(ask)
        self.log.append(("fork", ask.cache_id, ask.num_blocks))
        sealed = {(seal.cache_id, seal.block_index) for seal in self.seals}
        shared: list[int] = []
        for index, block_id in enumerate(self.tables.get(ask.parent_cache_id, [])[: ask.max_shared_blocks]):
            if (ask.parent_cache_id, index) not in sealed:
                break
            shared.append(block_id)
        self._holders.update(shared)
        self.tables[ask.cache_id] = shared
        self._grow("fork", ask.cache_id, ask.num_blocks, self._next_ticket, len(shared))

    def seal(self, ask: SealAsk) -> None:
        self.log.append(("seal", ask.cache_id, ask.block_index))
        error = self.refuse("seal", ask.cache_id)
        if error is not None:
            self.post(SealRefused(ask.cache_id, str(error)))
            return
        self.seals.append(ask)
        self.held_seals.append(ask)
        if not self.hold_seals:
            self.answer_seals()

    def release_block(self, cache_id: int, block_id: int) -> None:
        self.log.append(("release_block", cache_id, block_id))

    def answer_seals(self, most: int | None = None) -> None:
        """Answers seals that were held back, the oldest first."""
        answered = self.held_seals[:most]
        del self.held_seals[: len(answered)]
        for ask in answered:
            self.post(BlockSealed(ask.cache_id, ask.block_index, ask.block_id, ask.block_id))

    def grant_held(self) -> None:
        """Answers the extends that were held back."""
        self.hold_extends = False
        for kind, cache_id, num_blocks in list(self.log):
            if kind == "extend" and cache_id in self.tables and len(self.tables[cache_id]) < num_blocks:
                self._grow("extend", cache_id, num_blocks, None)

    def _grow(self, kind: str, cache_id: int, num_blocks: int, ticket: int | None, num_shared: int = 0) -> None:
        error = self.refuse(kind, cache_id)
        if error is not None:
            if kind != "extend":
                self._drop(cache_id)
            self.post(LeaseRefused(cache_id, error))
            return
        table = self.tables.setdefault(cache_id, [])
        while len(table) < num_blocks:
            table.append(self.free.pop())
            self._holders[table[-1]] += 1
        self.post(LeaseGranted(cache_id, tuple(table), num_shared * self.block_size, ticket))

    def release(self, cache_id: int) -> None:
        self.log.append(("release", cache_id, 0))
        self._drop(cache_id)

    def _drop(self, cache_id: int) -> None:
        for block_id in reversed(self.tables.pop(cache_id, [])):
            self._holders[block_id] -= 1
            if not self._holders[block_id]:
                self.free.append(block_id)

    async def open(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Outcome:
    """Everything that was emitted for one request."""

    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def admitted(self) -> list[Admitted]:
        return [event for event in self.events if isinstance(event, Admitted)]

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def finished(self) -> Finished:
        assert isinstance(self.last, Finished), self.last
        return self.last

    @property
    def error(self) -> Exception:
        assert isinstance(self.last, Failed), self.last
        return self.last.error


class EngineHarness:
    """A running engine, and what it has emitted. `wait` polls on the emissions with a deadline."""

    def __init__(self, leases: LeasePort, settings: EngineSettings | None = None) -> None:
        self.model = FakeModel()
        self.outcomes: dict[str, Outcome] = {}
        self.bursts: list[Sequence[tuple[str, Event]]] = []
        self._emitted = threading.Condition()
        self.leases = leases
        loaded = LoadedModel(self.model, GEOMETRY, "fake-1")
        self.engine = Engine(lambda: loaded, leases, settings or EngineSettings(), self._emit)

    def __enter__(self) -> EngineHarness:
        self.engine.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.gate.set()
        self.engine.stop(0.0)

    def _emit(self, events: Sequence[tuple[str, Event]]) -> None:
        with self._emitted:
            self.bursts.append(events)
            for request_id, event in events:
                self.outcomes.setdefault(request_id, Outcome()).events.append(event)
            self._emitted.notify_all()

    def wait(self, condition: Callable[[], object]) -> None:
        """Returns once the condition holds; it is looked at after every emission."""
        with self._emitted:
            assert self._emitted.wait_for(lambda: bool(condition()), DEADLINE_S), self.outcomes

    def num_tokens(self, request_id: str) -> int:
        """Tokens emitted for a request so far."""
        outcome = self.outcomes.get(request_id)
        return 0 if outcome is None else len(outcome.tokens)

    def outcome(self, request_id: str) -> Outcome:
        """Waits until the request has ended."""

        def ended() -> bool:
            outcome = self.outcomes.get(request_id)
            return outcome is not None and isinstance(outcome.last, (Finished, Failed))

        self.wait(ended)
        return self.outcomes[request_id]

    def run(self, *requests: DecodeRequest) -> list[Outcome]:
        """Submits all, and waits for all."""
        for request in requests:
            self.engine.submit(request)
        return [self.outcome(request.request_id) for request in requests]

    def post(self, message: LeaseMessage) -> None:
        """A message into the engine's inbox, as a port sends it."""
        self.leases.post(message)  # type: ignore[attr-defined]


def poll(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Waits until a condition that nothing signals holds."""
    deadline = time.monotonic() + deadline_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.002)


def make_request(name: str, num_prompt: int = 5, max_tokens: int = 8, **changes: Any) -> DecodeRequest:
    """A request whose prompt is made from its name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    prompt = [int(token_id) for token_id in np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_prompt)]
    sampling = changes.pop("sampling", SamplingParams(seed=seed))
    return DecodeRequest(name, prompt, sampling, max_tokens, **changes)
