"""`leasehold flush` and `leasehold scrub`: upkeep of the sealed blocks."""

from __future__ import annotations

import argparse
import json
import sys

from clients.cli.messages import describe, say
from clients.errors import ClientError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb


async def flush(args: argparse.Namespace) -> int:
    """Drops cached blocks and returns the exit code."""
    try:
        async with KvManagerClient(args.kv_manager) as client:
            flushed = (await client.flush(args.tenant)).num_flushed_blocks
    except ClientError as error:
        say(describe(error, service="KV manager", flag="--kv-manager"))
        return 1
    if args.json:
        print(json.dumps({"num_flushed_blocks": flushed}))
    else:
        whose = "" if args.tenant is None else f" of tenant {args.tenant!r}"
        print(f"{flushed} cached blocks{whose} are free now")
    return 0


async def scrub(args: argparse.Namespace) -> int:
    """Verifies every sealed block, shows how far it is, and returns the exit code: 1 when a block was damaged."""
    progress = pb.ScrubProgress()
    try:
        async with KvManagerClient(args.kv_manager) as client:
            async for progress in client.scrub(args.rate):
                _show(progress)
    except ClientError as error:
        say(describe(error, service="KV manager", flag="--kv-manager"))
        return 1
    if not progress.done:
        say("the manager ended the scrub before it was through; try again")
        return 1
    if args.json:
        names = ("num_blocks", "num_checked", "num_corrupt", "num_bytes")
        print(json.dumps({name: getattr(progress, name) for name in names}))
    else:
        print(f"{progress.num_checked} of {progress.num_blocks} sealed blocks checked, {progress.num_corrupt} damaged")
        if progress.num_corrupt:
            print(
                "no damaged block is found by a prefix any more; running requests that read one keep it until they end"
            )
    return 1 if progress.num_corrupt else 0


def _show(progress: pb.ScrubProgress) -> None:
    if sys.stderr.isatty():
        end = "\n" if progress.done else ""
        print(
            f"\rscrubbed {progress.num_checked} of {progress.num_blocks} blocks", end=end, file=sys.stderr, flush=True
        )
