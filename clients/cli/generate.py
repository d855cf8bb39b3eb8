"""`leasehold generate`: one prompt, one answer, or several samples of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import aclosing

from clients.cli import outcome as outcomes
from clients.cli.messages import describe, describe_break, describe_resumption, say
from clients.cli.outcome import Outcome
from clients.cli.requests import generate_request
from clients.cli.terminal import printable
from clients.decoder import DecoderClient
from clients.errors import ClientError, DeadlineError
from clients.events import StreamBroken, StreamResumed, Tokens
from clients.progress import draw_seed
from protos import decoder_pb2 as pb


class RetryNotes:
    """Says once an outage why the client waits, and where it goes on."""

    def __init__(self, retry_for_s: float) -> None:
        self._retry_for_s = retry_for_s
        self._told = False

    def broken(self, event: StreamBroken) -> None:
        """Tells the first break; the attempts after it fail for the same reason."""
        if not self._told:
            say(describe_break(event, self._retry_for_s))
        self._told = True

    def resumed(self, event: StreamResumed) -> None:
        """Tells that the stream goes on."""
        say(describe_resumption(event))
        self._told = False


async def run(args: argparse.Namespace, default_decoder: str) -> int:
    """Streams the answer, prints it or the JSON object, and returns the exit code; a cancellation is passed on."""
    outcome = Outcome(args.seed if args.seed is not None else draw_seed(), time.monotonic, args.n)
    notes = RetryNotes(args.retry_for)
    cancelled: asyncio.CancelledError | None = None
    try:
        async with DecoderClient(args.decoder or [default_decoder], on_unary_retry=notes.broken) as client:
            await _stream(client, args, outcome, notes)
        outcome.end()
    except asyncio.CancelledError as error:
        cancelled = error
        outcome.end(outcomes.CANCELLED)
    except TimeoutError:
        outcome.end(outcomes.DEADLINE)
        say(f"DEADLINE_EXCEEDED: no decoder answered within the {args.timeout:g} s of --timeout")
    except ClientError as error:
        own_deadline = isinstance(error, DeadlineError) and args.timeout is not None
        outcome.end(outcomes.DEADLINE if own_deadline else outcomes.ERROR, None if own_deadline else error)
        say(describe(error))
    _print(args, outcome)
    if cancelled is not None:
        raise cancelled
    return 0 if outcome.is_whole else 1


async def _stream(client: DecoderClient, args: argparse.Namespace, outcome: Outcome, notes: RetryNotes) -> None:
    async with asyncio.timeout(args.timeout):
        has_chat_template = await _uses_chat_template(client, args)
    request = generate_request(args, outcome.seed, has_chat_template)
    left_s = None if args.timeout is None else max(0.0, outcome.began + args.timeout - time.monotonic())
    async with aclosing(client.generate(request, retry_for_s=args.retry_for, timeout_s=left_s)) as events:
        async for event in events:
            outcome.take(event)
            if isinstance(event, Tokens) and not args.json and args.n == 1:
                sys.stdout.write(printable(event.text))
                sys.stdout.flush()
            elif isinstance(event, StreamBroken):
                notes.broken(event)
            elif isinstance(event, StreamResumed):
                notes.resumed(event)


async def _uses_chat_template(client: DecoderClient, args: argparse.Namespace) -> bool:
    if args.token_ids is not None or args.raw:
        return False
    info: pb.GetModelInfoResponse = await client.model_info(retry_for_s=args.retry_for)
    return info.has_chat_template


def _print(args: argparse.Namespace, outcome: Outcome) -> None:
    if args.json:
        print(json.dumps(outcome.to_object(with_logprobs=args.logprobs is not None), ensure_ascii=False), flush=True)
        return
    for index, sample in enumerate(outcome.samples):
        if args.n > 1:  # one after another, because their texts grow at the same time
            print(f"--- sample {index}: {sample.finish_reason}, {len(sample.token_ids)} tokens")
            print(printable(sample.text), flush=True)
        elif sample.pieces:
            print(flush=True)
        for position, item in enumerate(sample.logprobs):
            top = " ".join(f"{token_id}:{logprob:.4f}" for token_id, logprob in item.top)
            print(f"{position:6d}  {item.token_id:8d}  {item.logprob:9.4f}  {top}", file=sys.stderr)
    if outcome.num_prompt_tokens is not None:
        print(f"[{outcome.summary()}]", file=sys.stderr, flush=True)
