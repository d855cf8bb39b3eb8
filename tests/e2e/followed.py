"""Streams through the client library, and waiting for how far they have come: tests act on progress, never on time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from clients.decoder import DecoderClient
from clients.events import Event, Finished, Started, StreamBroken, StreamResumed, Tokens
from protos import decoder_pb2 as pb

RETRY_FOR_S = 240.0  # a busy machine may take long to start a decoder again; pytest-timeout ends what hangs


class Pace:
    """Counts the tokens of many streams."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def add(self, num_tokens: int) -> None:
        """More tokens have come."""
        self.num_tokens += num_tokens
        due = [waiter for waiter in self._waiting if waiter[0] <= self.num_tokens]
        self._waiting = [waiter for waiter in self._waiting if waiter[0] > self.num_tokens]
        for _, reached in due:
            if not reached.done():
                reached.set_result(None)

    async def reach(self, num_tokens: int) -> None:
        """Returns when so many tokens have come in all."""
        if num_tokens > self.num_tokens:
            reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((num_tokens, reached))
            await reached


@dataclass
class Sample:
    """What one stream brought of one sample."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None


@dataclass
class Followed:
    """All that one stream brought; of several samples, `token_ids` and `text` are as they came in."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    started: Started | None = None
    finished: Finished | None = None  # None: cancelled by the test
    broken: list[StreamBroken] = field(default_factory=list)
    resumed: list[StreamResumed] = field(default_factory=list)
    samples: dict[int, Sample] = field(default_factory=dict)  # by index

    def sample(self, index: int) -> Sample:
        """One sample; empty when nothing of it has come."""
        return self.samples.setdefault(index, Sample())

    def take(self, event: Event) -> int:
        """Notes an event; the number of tokens in it."""
        match event:
            case Tokens():
                self.token_ids += event.token_ids
                self.text += event.text
                sample = self.sample(event.sample_index)
                assert event.position == len(sample.token_ids), f"{event} after {len(sample.token_ids)} tokens"
                sample.token_ids += event.token_ids
                sample.text += event.text
                return len(event.token_ids)
            case Started():
                self.started = event
            case Finished():
                self.finished = self.sample(event.sample_index).finished = event
            case StreamBroken():
                self.broken.append(event)
            case StreamResumed():
                self.resumed.append(event)
        return 0


async def follow(
    client: DecoderClient,
    request: pb.GenerateRequest,
    *,
    pace: Pace | None = None,
    start_at: int = 0,
    cancel_at: int | None = None,
    timeout_s: float | None = None,
    tenant: str = "",
    retry_for_s: float = RETRY_FOR_S,
    into: Followed | None = None,
) -> Followed:
    """A whole stream, begun when `pace` has come to start_at, cancelled once it has cancel_at tokens of its own."""
    if pace is not None:
        await pace.reach(start_at)
    followed = Followed() if into is None else into
    stream = client.generate(request, retry_for_s=retry_for_s, timeout_s=timeout_s, tenant=tenant)
    async with aclosing(stream) as events:
        async for event in events:
            num_tokens = followed.take(event)
            if pace is not None and num_tokens:
                pace.add(num_tokens)
            if cancel_at is not None and len(followed.token_ids) >= cancel_at:
                return followed
    return followed


def token_request(
    prompt: Sequence[int], max_tokens: int, *, seed: int | None = None, temperature: float = 1.0, request_id: str = ""
) -> pb.GenerateRequest:
    """Exactly max_tokens tokens after a prompt of token ids: greedy, or sampled with a seed."""
    sampling = pb.SamplingParams() if seed is None else pb.SamplingParams(temperature=temperature, seed=seed)
    return pb.GenerateRequest(
        request_id=request_id,
        token_ids=pb.TokenIds(ids=prompt),
        sampling=sampling,
        stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )
