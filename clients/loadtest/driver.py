"""Sends the load: when the schedule says so, whatever the answers do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from clients.errors import CallError, DeadlineError, ProtocolError
from clients.events import Event, Started, StreamResumed, Tokens
from clients.loadtest import records
from clients.loadtest.arrivals import Arrivals
from clients.loadtest.lengths import Numbers
from clients.loadtest.records import RequestRecord, RunRecord
from clients.loadtest.workload import Ask, Conversation, Workload
from protos import decoder_pb2 as pb

NO_WAIT = Numbers(0.0, 0.0)

# Token ids of every turn, from a run with one request at a time: (conversation, turn) to ids.
Reference = dict[tuple[int, int], list[int]]


class Generate(Protocol):
    """DecoderClient.generate, or something like it."""

    def __call__(
        self, request: pb.GenerateRequest, *, retry_for_s: float, timeout_s: float | None, tenant: str
    ) -> AsyncGenerator[Event, None]:
        """Streams one request."""


@dataclass(frozen=True)
class Plan:
    """How the load comes: `arrivals` for an open loop, else `users` in a closed one; times in seconds."""

    duration_s: float
    drain_s: float = 60.0  # how long requests may go on after the last one was due
    arrivals: Arrivals | None = None
    users: int = 1
    ramp_up_s: float = 0.0  # over which the users of a closed loop begin
    think_s: Numbers = NO_WAIT  # between two turns, and between two conversations of a user
    max_conversations: int | None = None
    retry_for_s: float = 30.0
    seed: int = 0


@dataclass
class Driver:
    """One run. `run.requests` grows while it goes on, so that a display can look at it."""

    generate: Generate
    workload: Workload
    plan: Plan
    run: RunRecord
    reference: Reference | None = None
    reference_size: int = 1  # conversations after which the workload repeats
    num_in_flight: int = 0
    num_tokens: int = 0
    _began: float = 0.0
    _next_conversation: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _failure: BaseException | None = None

    def now_s(self) -> float:
        """Seconds since the run began, on the event loop's clock."""
        return asyncio.get_running_loop().time() - self._began

    async def drive(self) -> None:
        """Runs the whole plan; what still runs drain_s after the last request was due is cancelled and says so."""
        self._began = asyncio.get_running_loop().time()
        self.run.duration_s = self.plan.duration_s
        try:
            if self.plan.arrivals is None:
                await self._closed_loop()
            else:
                await self._open_loop(self.plan.arrivals)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.run.ended_s = self.now_s()
            if self._spent():
                self.run.duration_s = min(self.plan.duration_s, self.run.ended_s)

    async def _open_loop(self, arrivals: Arrivals) -> None:
        for due_s in arrivals.times(random.Random(f"{self.plan.seed}:arrivals")):
            if self._spent():
                break
            wait_s = due_s - self.now_s()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._start(self._conversation(self._take_number(), due_s))
        await self._drain()

    async def _closed_loop(self) -> None:
        for number in range(self.plan.users):
            self._start(self._user(number))
        await self._drain()

    async def _user(self, number: int) -> None:
        rng = random.Random(f"{self.plan.seed}:user:{number}")
        await asyncio.sleep(self.plan.ramp_up_s * number / self.plan.users)
        while self.now_s() < self.plan.duration_s and not self._spent():
            await self._conversation(self._take_number(), self.now_s())
            await asyncio.sleep(self.plan.think_s.draw(rng, number))

    async def _conversation(self, number: int, due_s: float) -> None:
        conversation = self.workload.conversation(number)
        rng = random.Random(f"{self.plan.seed}:think:{number}")
        for turn in range(conversation.num_turns):
            record = await self._turn(conversation, number, turn, due_s)
            if record.status != records.OK or turn + 1 == conversation.num_turns or self.now_s() > self.plan.duration_s:
                return
            # The next turn is due a think time after the answer; a client that is late sends it late.
            due_s = record.ended_s + self.plan.think_s.draw(rng, number)
            await asyncio.sleep(max(0.0, due_s - self.now_s()))

    async def _turn(self, conversation: Conversation, number: int, turn: int, due_s: float) -> RequestRecord:
        ask = conversation.next()
        record = RequestRecord(number, turn, due_s, tenant=ask.tenant, priority=ask.request.priority)
        self.run.requests.append(record)
        record.sent_s = self.now_s()
        text: list[str] = []
        ids: list[int] = []
        self.num_in_flight += 1
        try:
            await self._stream(ask, record, text, ids)
        except DeadlineError as error:
            planned = ask.timeout_s is not None
            record.status = records.DEADLINE if planned else error.code.name
        except CallError as error:
            record.status, record.message = error.code.name, str(error)
        except ProtocolError as error:
            record.status, record.message = "PROTOCOL", str(error)
        finally:
            self.num_in_flight -= 1
            record.ended_s = self.now_s()
        self._judge(ask, record, "".join(text), ids)
        conversation.take("".join(text), ids)
        return record

    async def _stream(self, ask: Ask, record: RequestRecord, text: list[str], ids: list[int]) -> None:
        stream = self.generate(
            ask.request, retry_for_s=self.plan.retry_for_s, timeout_s=ask.timeout_s, tenant=ask.tenant
        )
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, Tokens):
                    text.append(event.text)
                    if not event.token_ids:
                        continue
                    ids += event.token_ids
                    record.arrivals_s.append(self.now_s())
                    record.arrival_counts.append(len(event.token_ids))
                    self.num_tokens += len(event.token_ids)
                    if ask.cancel_after_tokens is not None and len(ids) >= ask.cancel_after_tokens:
                        record.status = records.CANCELLED
                        return
                elif isinstance(event, Started):
                    record.started_s = self.now_s()
                    record.target = event.target
                    record.num_prompt_tokens = len(event.prompt_token_ids)
                    record.num_cached_tokens = event.num_cached_tokens
                elif isinstance(event, StreamResumed):
                    record.num_resumptions += 1
                    record.exact = record.exact and event.exact
        record.status = records.OK

    def _judge(self, ask: Ask, record: RequestRecord, text: str, ids: Sequence[int]) -> None:
        """Checks what came: a whole answer against the right one, any part of one against the recorded run."""
        if record.status not in records.PLANNED:
            return
        if record.status == records.OK:
            record.right = ask.check(text)
        if self.reference is not None:
            expected = self.reference.get((record.conversation % self.reference_size, record.turn))
            if expected is not None:
                wanted = expected if record.status == records.OK else expected[: len(ids)]
                record.right = record.right is not False and list(ids) == wanted
        if record.right is False:
            record.status = records.WRONG
            record.message = f"got {text!r}" if ask.probe is None else f"got {text!r}, not {ask.probe.answer!r}"

    def _take_number(self) -> int:
        self._next_conversation += 1
        return self._next_conversation - 1

    def _spent(self) -> bool:
        limit = self.plan.max_conversations
        return limit is not None and self._next_conversation >= limit

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()

    async def _drain(self) -> None:
        """Waits for what was started: until the arrivals end, and drain_s longer."""
        left_s = self.plan.duration_s + self.plan.drain_s - self.now_s()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=max(0.0, left_s))
        if self._failure is not None:  # a fault of the harness itself: what a server can do wrong is in the records
            raise self._failure


async def record_reference(generate: Generate, workload: Workload, num_conversations: int) -> Reference:
    """Asks every distinct request once, one at a time, without cancellations, and keeps its tokens."""
    reference: Reference = {}
    for number in range(num_conversations):
        conversation = workload.conversation(number)
        for turn in range(conversation.num_turns):
            ask = conversation.next()
            ids: list[int] = []
            text: list[str] = []
            async with aclosing(generate(ask.request, retry_for_s=30.0, timeout_s=None, tenant=ask.tenant)) as stream:
                async for event in stream:
                    if isinstance(event, Tokens):
                        ids += event.token_ids
                        text.append(event.text)
            reference[(number, turn)] = ids
            conversation.take("".join(text), ids)
    return reference
