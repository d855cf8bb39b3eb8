"""A decoder that is only a delay model: known times to the first token and between tokens, and stalls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from clients.errors import CallError, DeadlineError, ErrorDetails
from clients.events import Event, Finished, FinishReason, Started, Tokens
from protos import decoder_pb2 as pb


@dataclass
class FakeSystem:
    """Stands in for DecoderClient.generate; `served` holds (sent at, first token at) of every request."""

    ttft_s: Callable[[int], float] = lambda number: 0.1
    itl_s: float = 0.01
    num_tokens: int = 5
    stalls: Sequence[tuple[float, float]] = ()  # (begin, end): nothing is answered in between
    answer: Callable[[pb.GenerateRequest], str] = lambda request: "x"
    fails: Callable[[int], grpc.StatusCode | None] = lambda number: None
    served: list[tuple[float, float]] = field(default_factory=list)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def generate(
        self, request: pb.GenerateRequest, *, retry_for_s: float, timeout_s: float | None, tenant: str
    ) -> AsyncGenerator[Event, None]:
        loop = asyncio.get_running_loop()
        number, sent_at = len(self.requests), loop.time()
        self.requests.append(request)
        self.tenants.append(tenant)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await self._until(sent_at + self.ttft_s(number), sent_at, timeout_s)
            code = self.fails(number)
            if code is not None:
                raise CallError(ErrorDetails(code, "as planned", "fake"))
            self.served.append((sent_at, loop.time()))
            prompt_ids = tuple(request.token_ids.ids) or (1, 2, 3, 4)
            yield Started("id", "fake", prompt_ids, request.sampling.seed, 9, "n", len(prompt_ids) // 2)
            text = self.answer(request)
            for position in range(self.num_tokens):
                if position:
                    await self._until(loop.time() + self.itl_s, sent_at, timeout_s)
                yield Tokens(0, position, (position,), text if position == 0 else "", ())
            yield Finished(0, FinishReason.STOP, len(prompt_ids), self.num_tokens, 0, "", None)
        finally:
            self.num_running -= 1

    async def _until(self, at: float, sent_at: float, timeout_s: float | None) -> None:
        for begin, end in self.stalls:
            if begin <= at < end:
                at = end
        loop = asyncio.get_running_loop()
        deadline = at if timeout_s is None else min(at, sent_at + timeout_s)
        await asyncio.sleep(max(0.0, deadline - loop.time()))
        if deadline < at:
            raise DeadlineError(ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", "fake"))
