"""`leasehold up`: a manager and decoders on this host, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clients.checkpoints import find_model
from clients.cli.log_lines import readable
from clients.cli.messages import describe, say
from clients.errors import ClientError
from clients.stack import Stack, StackConfig

_DECODER_FLAGS = (
    "backend",
    "max_seqs",
    "kv_capacity",
    "max_num_batched_tokens",
    "kv_dtype",
    "kv_layout",
    "reserve",
    "log_level",
)
_MANAGER_FLAGS = ("num_blocks", "pool_bytes", "block_size", "pool_memory", "log_level")
_STILL_WAITING_S = 15.0


class MissingExtraError(ClientError):
    """The decoder's dependencies are not installed."""


@contextlib.contextmanager
def pool_folder(given: str | None) -> Iterator[Path]:
    """The folder given, made if need be; or a temporary one, removed at the end."""
    if given is not None:
        folder = Path(given).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="leasehold-pool-") as temporary:
        yield Path(temporary)


def stack_config(args: argparse.Namespace, model: Path, pool_dir: Path) -> StackConfig:
    """What the flags of `up` start."""
    if args.backend == "cuda" and args.pool_memory is None:
        args.pool_memory = "cuda"
    return StackConfig(
        model=model,
        pool_dir=pool_dir,
        num_decoders=args.decoders,
        host=args.host,
        manager_port=args.manager_port,
        decoder_port=args.decoder_port,
        manager_flags=_flags(args, _MANAGER_FLAGS),
        decoder_flags=_flags(args, _DECODER_FLAGS),
    )


def check_decoder_extra() -> None:
    """Raises MissingExtraError where only the core dependencies are installed."""
    missing = [name for name in ("mlx", "numpy", "safetensors", "tokenizers") if not importlib.util.find_spec(name)]
    if missing:
        raise MissingExtraError(
            f"a decoder cannot run here: {', '.join(missing)} not installed; pip install 'leasehold[decoder]'"
        )


async def run(args: argparse.Namespace) -> int:
    """Runs the services until one dies or a cancellation comes, which is passed on once all have stopped."""
    try:
        check_decoder_extra()
        model = find_model(args.model)
        with pool_folder(args.pool_dir) as pool_dir:
            return await _run_stack(Stack(stack_config(args, model, pool_dir), _print_line))
    except ClientError as error:
        say(describe(error))
        return 1
    except OSError as error:
        say(f"--pool-dir: {error}")
        return 1


async def _run_stack(stack: Stack) -> int:
    try:
        await _start(stack)
        _print_addresses(stack)
        await stack.watch()
    except asyncio.CancelledError:
        say("stopping; Ctrl-C again kills")
        raise
    except ClientError as error:
        say(f"{describe(error)}; stopping the rest")
        return 1
    finally:
        await _stop(stack)
    return 0


async def _start(stack: Stack) -> None:
    starting = asyncio.create_task(stack.start())
    try:
        while not (await asyncio.wait({starting}, timeout=_STILL_WAITING_S))[0]:
            say("still starting: a large checkpoint takes its time to load")
        starting.result()
    finally:
        starting.cancel()


async def _stop(stack: Stack) -> None:
    stopping = asyncio.create_task(stack.stop())
    try:
        await asyncio.shield(stopping)
    except asyncio.CancelledError:
        stack.kill()
        await stopping
        raise


def _print_line(name: str, line: str) -> None:
    print(readable(name, line), file=sys.stderr, flush=True)


def _print_addresses(stack: Stack) -> None:
    for process in stack.processes:
        print(f"{process.name:12s} {process.address}")
    decoders = " ".join(f"--decoder {address}" for address in stack.decoder_addresses)
    print(f"ready; in another terminal:  leasehold chat {decoders}", flush=True)


def _flags(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    flags: list[str] = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags
