"""`leasehold top`: a live view of the pool, its holders and the decoders."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clients.cli.messages import describe, say
from clients.cli.terminal import printable, table
from clients.errors import ClientError
from clients.kv_manager import KvManagerClient
from clients.metrics import DecoderFigures, decoder_figures, scrape
from protos import kv_manager_pb2 as pb

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST, _RESET = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[0m"
_HOLDER_COLOURS = (34, 32, 33, 35, 36, 31)
_STATE_COLOURS = {"leased": 34, "sealed": 32, "cached": 35, "quarantined": 31, "free": 90}
_SIGNS = {"leased": "█", "sealed": "▓", "cached": "░", "quarantined": "X", "free": "·"}
_STATE_CODES = {"free": 0, "leased": 1, "sealed": 2, "cached": 3, "quarantined": 4}
_BUSIEST_FIRST = ("quarantined", "leased", "sealed", "cached")
_MAP_SHARE = 0.5  # of the lines, at most
_MAX_LEASES = 12


@dataclass(frozen=True)
class View:
    """All that one frame shows."""

    stats: pb.StatsResponse
    listing: pb.ListLeasesResponse
    decoders: Mapping[str, tuple[DecoderFigures | None, DecoderFigures | None]] = field(default_factory=dict)


async def run(args: argparse.Namespace) -> int:
    """Draws until it is cancelled; once with --once, or when stdout is no terminal."""
    live = sys.stdout.isatty() and not args.once
    before: dict[str, DecoderFigures | None] = {}
    async with KvManagerClient(args.kv_manager) as manager:
        try:
            first = await _look(manager, args.metrics, before)
            if not live:
                print("\n".join(frame(first, *shutil.get_terminal_size(), colour=sys.stdout.isatty())))
                return 0
        except ClientError as error:
            say(describe(error, service="KV manager", flag="--kv-manager"))
            return 1
        sys.stdout.write(_ENTER)
        try:
            while True:
                lines = await _frame_or_trouble(manager, args.metrics, before)
                sys.stdout.write(_HOME + "".join(line + _CLEAR_LINE + "\n" for line in lines) + _CLEAR_REST)
                sys.stdout.flush()
                await asyncio.sleep(args.interval)
        finally:
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()


async def _frame_or_trouble(
    manager: KvManagerClient, metrics: Sequence[str], before: dict[str, DecoderFigures | None]
) -> list[str]:
    """The lines of a frame; of a manager that is away, that it is: it may come back."""
    width, height = shutil.get_terminal_size()
    try:
        return frame(await _look(manager, metrics, before), width, height - 1, colour=True)
    except ClientError as error:
        return [describe(error, service="KV manager", flag="--kv-manager")[: width - 1]]


async def _look(manager: KvManagerClient, metrics: Sequence[str], before: dict[str, DecoderFigures | None]) -> View:
    stats, listing = await manager.stats(), await manager.list_leases(with_block_states=True)
    decoders: dict[str, tuple[DecoderFigures | None, DecoderFigures | None]] = {}
    for address in metrics:
        try:
            now: DecoderFigures | None = decoder_figures(asyncio.get_running_loop().time(), await scrape(address))
        except (OSError, TimeoutError, ValueError):
            now = None
        decoders[address] = (before.get(address), now)
        before[address] = now
    return View(stats, listing, decoders)


def frame(view: View, width: int, height: int, colour: bool) -> list[str]:
    """The lines of one picture, which fit the terminal."""
    stats, listing = view.stats, view.listing
    workers = sorted(
        {session.worker_id for session in listing.sessions} | {lease.worker_id for lease in listing.leases}
    )
    paints = {worker: _HOLDER_COLOURS[i % len(_HOLDER_COLOURS)] if colour else 0 for i, worker in enumerate(workers)}
    states = "  ".join(
        _paint(f"{getattr(stats, name)} {name}", code if colour else 0) for name, code in _STATE_COLOURS.items()
    )
    lines = [f"leasehold top   {stats.num_blocks} blocks: {states}", _rates(stats), ""]
    lines += block_map(view, width, max(2, int(height * _MAP_SHARE)), paints)
    lines += ["", *_sessions(listing, paints)]
    if view.decoders:
        lines += ["", *_decoders(view)]
    lines += ["", *_leases(listing, width)]
    return lines[:height]


def block_map(view: View, width: int, max_lines: int, paints: Mapping[str, int]) -> list[str]:
    """The pool from block 0 on: state by sign, holder by colour; a cell of several blocks shows the busiest state in it."""
    num_blocks = view.stats.num_blocks
    if not num_blocks:
        return ["no pool yet: its size comes from the first decoder"]
    holder: dict[int, str] = {}
    for lease in view.listing.leases:
        for block_id in lease.block_ids:
            holder.setdefault(block_id, lease.worker_id)
    states = view.listing.block_states.ljust(num_blocks, b"\0")
    per_cell = -(-num_blocks // (max(1, width - 1) * max_lines))
    cells = []
    for first in range(0, num_blocks, per_cell):
        block_ids = range(first, min(first + per_cell, num_blocks))
        found = set(states[first : block_ids.stop])
        name = next((name for name in _BUSIEST_FIRST if _STATE_CODES[name] in found), "free")
        holders = [holder[block_id] for block_id in block_ids if block_id in holder]
        colour = _STATE_COLOURS[name] if paints and any(paints.values()) else 0
        if holders and name in ("leased", "sealed"):
            colour = paints.get(max(set(holders), key=holders.count), colour)
        cells.append(_paint(_SIGNS[name], colour))
    lines = ["".join(cells[at : at + width - 1]) for at in range(0, len(cells), width - 1)]
    legend = "  ".join(_paint(f"■ {worker}", code) for worker, code in paints.items())
    signs = "  ".join(f"{sign} {name}" for name, sign in _SIGNS.items())
    scale = "" if per_cell == 1 else f"   {per_cell} blocks a cell"
    return [*lines, f"{signs}   {legend}{scale}".rstrip()]


def _rates(stats: pb.StatsResponse) -> str:
    looked_up = stats.num_looked_up
    hits = f"{stats.num_hits / looked_up:.1%} of {looked_up} looked up" if looked_up else "none looked up"
    return (
        f"hits {hits}   {stats.num_waiting} waiting   {stats.num_evicted} evicted   {stats.num_preempted} preempted   "
        f"{stats.num_exhausted} refused   {stats.num_revoked} revoked   up {stats.uptime_ms // 1000} s"
    )


def _sessions(listing: pb.ListLeasesResponse, paints: Mapping[str, int]) -> list[str]:
    rows = [
        [
            session.worker_id,
            session.state,
            session.num_leases,
            session.num_blocks,
            session.silent_ms,
            str(session.busy_ms) if session.HasField("busy_ms") else "idle",
            session.pid,
        ]
        for session in listing.sessions
    ]
    if not rows:
        return ["no sessions"]
    head, *body = table(("session", "state", "leases", "blocks", "silent ms", "step ms", "pid"), rows).splitlines()
    painted = [_paint(line, paints[s.worker_id]) for line, s in zip(body, listing.sessions, strict=True)]
    return [head, *painted]


def _decoders(view: View) -> list[str]:
    rows = []
    for address, (before, now) in view.decoders.items():
        if now is None:
            rows.append([address, "away", "", "", ""])
            continue
        rates = ["-", "-"]
        if before is not None and now.time_s > before.time_s:
            rates[0] = f"{max(0.0, now.num_tokens - before.num_tokens) / (now.time_s - before.time_s):.0f}"
            steps = now.num_steps - before.num_steps
            if steps > 0:
                rates[1] = f"{(now.step_seconds - before.step_seconds) / steps * 1000:.1f}"
        rows.append([address, rates[0], f"{now.num_running:.0f}", f"{now.num_waiting:.0f}", rates[1]])
    return table(("decoder", "tokens/s", "running", "queue", "step ms"), rows).splitlines()


def _leases(listing: pb.ListLeasesResponse, width: int) -> list[str]:
    if not listing.leases:
        return ["no leases"]
    longest = sorted(listing.leases, key=lambda lease: len(lease.block_ids), reverse=True)[:_MAX_LEASES]
    rows = [
        [
            lease.worker_id,
            lease.cache_id,
            len(lease.block_ids),
            lease.priority,
            printable(lease.tenant),
            lease.age_ticket,
        ]
        for lease in longest
    ]
    lines = table(("lease of", "cache id", "blocks", "priority", "tenant", "age"), rows).splitlines()
    hidden = len(listing.leases) - len(longest)
    return [line[: width - 1] for line in lines] + ([f"and {hidden} more"] if hidden else [])


def _paint(text: str, colour: int) -> str:
    return f"\x1b[{colour}m{text}{_RESET}" if colour else text
