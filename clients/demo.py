"""`make demo`: both services, a conversation, 32 concurrent requests that must all be answered right, and an end."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from clients.checkpoints import DEMO, find_model
from clients.cli.app import run_cancellable
from clients.cli.log_lines import readable
from clients.cli.messages import describe, say
from clients.cli.terminal import printable
from clients.cli.up import check_decoder_extra
from clients.decoder import DecoderClient
from clients.errors import ClientError
from clients.events import Tokens
from clients.kv_manager import KvManagerClient
from clients.percentiles import percentile
from clients.probes import Probe, is_correct, make_memory, make_probe
from clients.stack import Stack, StackConfig
from protos import decoder_pb2 as pb
from protos import kv_manager_pb2 as kv_pb

NUM_PROBES = 32
MAX_TOKENS = 64
TIMEOUT_S = 300.0
_SEED = 1
_POLL_S = 0.05
_RELEASE_WAIT_S = 10.0
_LINE_EVERY = 8  # answers a progress line, where no terminal is


@dataclass(frozen=True)
class Answer:
    """One answered probe; times in seconds."""

    right: bool
    num_tokens: int
    ttft_s: float


class Progress:
    """How many answers have come: one line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._tty = sys.stdout.isatty()

    def advance(self) -> None:
        """One more answer has come."""
        self._done += 1
        if self._tty:
            filled = 32 * self._done // self._total
            end = "\n" if self._done == self._total else ""
            print(f"\r  [{'#' * filled}{'.' * (32 - filled)}] {self._done}/{self._total}", end=end, flush=True)
        elif self._done % _LINE_EVERY == 0 or self._done == self._total:
            print(f"  {self._done} of {self._total} answered", flush=True)


async def run() -> int:
    """Shows everything once; 1 when an answer was wrong or a block stayed leased."""
    try:
        check_decoder_extra()
        model = find_model(DEMO)
        with tempfile.TemporaryDirectory(prefix="leasehold-demo-") as folder:
            quiet = ("--log-level", "warning")
            config = StackConfig(
                model, Path(folder), manager_port=0, decoder_port=0, manager_flags=quiet, decoder_flags=quiet
            )
            stack = Stack(config, lambda name, line: print(readable(name, line), file=sys.stderr, flush=True))
            try:
                print("starting a KV manager and a decoder with the bundled model ...", flush=True)
                await stack.start()
                return await _beside_watch(stack, _show(stack))
            finally:
                await stack.stop()
    except ClientError as error:
        say(describe(error))
        return 1


async def _beside_watch(stack: Stack, show: Awaitable[int]) -> int:
    """What `show` returns, unless a service dies before."""
    watching = asyncio.ensure_future(stack.watch())
    showing = asyncio.ensure_future(show)
    try:
        await asyncio.wait({watching, showing}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return showing.result()
    finally:
        for task in (watching, showing):
            task.cancel()
        with suppress(asyncio.CancelledError, ClientError):
            await showing


async def _show(stack: Stack) -> int:
    print(f"  kv-manager {stack.manager.address}\n  decoder    {stack.decoders[0].address}\n", flush=True)
    rng = random.Random(_SEED)
    async with DecoderClient(stack.decoder_addresses) as decoder, KvManagerClient(stack.manager.address) as manager:
        before = await manager.stats()
        num_turns, num_right_turns = await _converse(decoder, rng)
        probes = [make_probe("recall", rng, held_out=True) for _ in range(NUM_PROBES)]
        print(f"\n{NUM_PROBES} questions at once:", flush=True)
        began = time.monotonic()
        answers, peak = await _with_peak(manager, _ask_all(decoder, probes))
        elapsed_s = time.monotonic() - began
        after = await _when_released(manager)
    _print_table(answers, elapsed_s, (num_right_turns, num_turns), (before, peak, after))
    failed = False
    if num_right_turns < num_turns or not all(answer.right for answer in answers):
        say("an answer was wrong")
        failed = True
    if after.leased or after.num_leases:
        say(f"{after.leased} blocks of {after.num_leases} leases were not given back")
        failed = True
    return 1 if failed else 0


async def _converse(client: DecoderClient, rng: random.Random) -> tuple[int, int]:
    """Streams a conversation; returns how many turns it had, and how many were answered right."""
    told, asked = make_memory(rng, "Ada", held_out=True)
    turns = [told, make_probe("arithmetic", rng, held_out=True), asked]
    messages: list[pb.ChatMessage] = []
    num_right = 0
    for probe in turns:
        print(f"you:   {probe.prompt}\nmodel: ", end="", flush=True)
        messages.append(pb.ChatMessage(role="user", content=probe.prompt))
        text = ""
        async for event in client.generate(_request(messages), timeout_s=TIMEOUT_S):
            if isinstance(event, Tokens):
                text += event.text
                print(printable(event.text), end="", flush=True)
        print(flush=True)
        messages.append(pb.ChatMessage(role="assistant", content=text))
        num_right += is_correct(probe, text)
    return len(turns), num_right


async def _ask_all(client: DecoderClient, probes: Sequence[Probe]) -> list[Answer]:
    progress = Progress(len(probes))
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_ask(client, probe, progress.advance)) for probe in probes]
    except* ClientError as errors:
        raise errors.exceptions[0] from None  # one line says it; the others failed alike
    return [task.result() for task in tasks]


async def _ask(client: DecoderClient, probe: Probe, advance: Callable[[], None]) -> Answer:
    began = time.monotonic()
    ttft_s, num_tokens, text = 0.0, 0, ""
    request = _request([pb.ChatMessage(role="user", content=probe.prompt)])
    async with aclosing(client.generate(request, timeout_s=TIMEOUT_S)) as events:
        async for event in events:
            if isinstance(event, Tokens):
                if event.token_ids and not num_tokens:
                    ttft_s = time.monotonic() - began
                num_tokens += len(event.token_ids)
                text += event.text
    advance()
    return Answer(is_correct(probe, text), num_tokens, ttft_s)


async def _with_peak(
    manager: KvManagerClient, work: Awaitable[list[Answer]]
) -> tuple[list[Answer], kv_pb.StatsResponse]:
    """What `work` returns, and the fullest pool that was seen meanwhile."""
    peak = await manager.stats()

    async def poll() -> None:
        nonlocal peak
        while True:
            stats = await manager.stats()
            if stats.leased + stats.sealed > peak.leased + peak.sealed:
                peak = stats
            await asyncio.sleep(_POLL_S)

    polling = asyncio.create_task(poll())
    try:
        return await work, peak
    finally:
        polling.cancel()


async def _when_released(manager: KvManagerClient) -> kv_pb.StatsResponse:
    """The pool once every lease is given back, or as it is after a while: releases follow a request's end."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_RELEASE_WAIT_S):
            while (await manager.stats()).num_leases:  # noqa: ASYNC110  # the manager tells it only when asked
                await asyncio.sleep(_POLL_S)
    return await manager.stats()


def _request(messages: Sequence[pb.ChatMessage]) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), stop=pb.StopConditions(max_tokens=MAX_TOKENS))


def _print_table(
    answers: Sequence[Answer],
    elapsed_s: float,
    turns: tuple[int, int],
    pools: tuple[kv_pb.StatsResponse, kv_pb.StatsResponse, kv_pb.StatsResponse],
) -> None:
    ttfts = [answer.ttft_s for answer in answers]
    num_tokens = sum(answer.num_tokens for answer in answers)
    num_right = sum(answer.right for answer in answers)
    print()
    print(f"right answers       {num_right} of {len(answers)} (conversation: {turns[0]} of {turns[1]} turns)")
    print(f"tokens/s            {num_tokens / elapsed_s:.1f} ({num_tokens} tokens in {elapsed_s:.2f} s)")
    print(f"TTFT p50, p99       {percentile(ttfts, 0.5):.3f} s, {percentile(ttfts, 0.99):.3f} s")
    for name, stats in zip(("before", "during (peak)", "after"), pools, strict=True):
        print(
            f"pool {name:14s} {stats.num_blocks} blocks: {stats.free} free, {stats.leased} leased, {stats.sealed} sealed, "
            f"{stats.cached} cached, {stats.quarantined} quarantined"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_cancellable(run()))
