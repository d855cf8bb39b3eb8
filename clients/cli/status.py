"""`leasehold status`: the pool, its sessions and its leases."""

from __future__ import annotations

import argparse
import json

from clients.cli.messages import describe, say
from clients.cli.terminal import table
from clients.errors import ClientError
from clients.kv_manager import KvManagerClient
from protos import kv_manager_pb2 as pb

_COUNTS = ("num_blocks", "free", "leased", "sealed", "cached", "quarantined", "num_leases", "num_sessions")
_ACTIVITY = (
    "num_waiting",
    "num_acquired",
    "num_exhausted",
    "num_revoked",
    "num_preempted",
    "num_seals",
    "num_evicted",
    "num_corrupt",
)
_MAX_SHOWN_BLOCKS = 8


async def run(args: argparse.Namespace) -> int:
    """Prints what the manager says and returns the exit code."""
    try:
        async with KvManagerClient(args.kv_manager) as client:
            stats = await client.stats()
            listing = await client.list_leases()
            pool = await client.describe_pool()
    except ClientError as error:
        say(describe(error, service="KV manager", flag="--kv-manager"))
        return 1
    if args.json:
        print(json.dumps(to_object(stats, listing, pool)))
    else:
        print(to_text(stats, listing, pool))
    return 0


def to_object(
    stats: pb.StatsResponse, listing: pb.ListLeasesResponse, pool: pb.DescribePoolResponse
) -> dict[str, object]:
    """The object that `--json` prints."""
    result: dict[str, object] = {name: getattr(stats, name) for name in _COUNTS}
    result |= {name: getattr(stats, name) for name in _ACTIVITY}
    result["hit_rate"] = _hit_rate(stats)
    result["block_size"] = pool.block_size
    result["pool_dir"] = pool.pool_dir
    result["pool_memory"] = pool.pool_memory
    result["memory_is_absent"] = pool.memory_is_absent
    result["num_lost_pools"] = pool.num_lost_pools
    result["kv_dtype"], result["kv_layout"] = _stored_as(pool) if pool.HasField("pool") else (None, None)
    result["leases"] = [
        {
            "worker_id": lease.worker_id,
            "cache_id": lease.cache_id,
            "block_ids": list(lease.block_ids),
            "priority": lease.priority,
            "tenant": lease.tenant,
            "age_ticket": lease.age_ticket,
            "revoked": lease.revoked,
        }
        for lease in listing.leases
    ]
    result["sessions"] = [
        {
            "worker_id": session.worker_id,
            "epoch": session.epoch,
            "state": session.state,
            "num_leases": session.num_leases,
            "num_blocks": session.num_blocks,
            "silent_ms": session.silent_ms,
            "busy_ms": session.busy_ms if session.HasField("busy_ms") else None,
            "pid": session.pid,
        }
        for session in listing.sessions
    ]
    return result


def to_text(stats: pb.StatsResponse, listing: pb.ListLeasesResponse, pool: pb.DescribePoolResponse) -> str:
    """The tables for people."""
    if not pool.HasField("pool"):
        head = f"pool in {pool.pool_dir}: not made yet, its size comes from the first decoder{_memory_note(pool)}"
    else:
        size_mib = pool.pool.num_blocks * pool.pool.block_stride_bytes / (1 << 20)
        head = (
            f"pool in {pool.pool_dir}: {stats.num_blocks} blocks of {pool.block_size} tokens, {size_mib:.1f} MiB, "
            f"{' '.join(_stored_as(pool))}{_memory_note(pool)}"
        )
    parts = [head, table(_COUNTS, [[getattr(stats, name) for name in _COUNTS]])]
    activity = [*(getattr(stats, name) for name in _ACTIVITY), _percent(_hit_rate(stats))]
    parts.append(table((*(name.removeprefix("num_") for name in _ACTIVITY), "prefix hits"), [activity]))
    if listing.sessions:
        sessions = [
            [s.worker_id, s.epoch, s.state, s.num_leases, s.num_blocks, s.silent_ms, _busy(s), s.pid]
            for s in listing.sessions
        ]
        parts.append(table(("session", "epoch", "state", "leases", "blocks", "silent ms", "step ms", "pid"), sessions))
    parts += [_orphan_note(session) for session in listing.sessions if session.state == "orphaned"]
    if listing.leases:
        leases = [
            [lease.worker_id, lease.cache_id, len(lease.block_ids), lease.priority, lease.tenant, _blocks(lease)]
            for lease in listing.leases
        ]
        parts.append(table(("lease of", "cache id", "blocks", "priority", "tenant", "block ids"), leases))
    return "\n\n".join(parts)


def _stored_as(pool: pb.DescribePoolResponse) -> tuple[str, str]:
    """K/V's dtype and layout, as the decoder's flags name them."""
    geometry = pool.pool.geometry
    dtype, layout = pb.KvDtype.Name(geometry.kv_dtype), pb.KvLayout.Name(geometry.layout)
    return dtype.removeprefix("KV_DTYPE_").lower(), layout.removeprefix("KV_LAYOUT_").lower()


def _memory_note(pool: pb.DescribePoolResponse) -> str:
    """What there is to say of a pool in GPU memory."""
    if pool.pool_memory != "cuda":
        return ""
    notes = ["in GPU memory"]
    if pool.memory_is_absent:
        notes.append("which no decoder has brought back since the manager's restart")
    if pool.num_lost_pools:
        notes.append(f"{pool.num_lost_pools} lost since the start, because no decoder that had its memory was alive")
    return ", " + "; ".join(notes)


def _hit_rate(stats: pb.StatsResponse) -> float | None:
    """Share of the blocks that new leases looked for which were there; None before any was looked for."""
    return stats.num_hits / stats.num_looked_up if stats.num_looked_up else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _busy(session: pb.Session) -> str:
    return str(session.busy_ms) if session.HasField("busy_ms") else "idle"


def _orphan_note(session: pb.Session) -> str:
    return (
        f"{session.worker_id}: the worker's lock file was deleted, so nothing proves that its process (pid {session.pid}) has "
        f"ended; its {session.num_blocks} blocks stay quarantined until the host reboots. Never delete lock files."
    )


def _blocks(lease: pb.Lease) -> str:
    shown = " ".join(str(block_id) for block_id in lease.block_ids[:_MAX_SHOWN_BLOCKS])
    hidden = len(lease.block_ids) - _MAX_SHOWN_BLOCKS
    line = shown if hidden <= 0 else f"{shown} +{hidden}"
    return f"{line} (revoked)" if lease.revoked else line
