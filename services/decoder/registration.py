"""What a worker states about itself when it registers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protos import kv_manager_pb2 as pb
from services.decoder.leases import HeldLease, KvGeometry
from services.decoder.lock_file import WorkerLock

_KV_DTYPES = {"bf16": pb.KV_DTYPE_BF16, "f16": pb.KV_DTYPE_F16, "f32": pb.KV_DTYPE_F32, "int8": pb.KV_DTYPE_INT8}
_KV_LAYOUTS = {"hnd": pb.KV_LAYOUT_HND, "nhd": pb.KV_LAYOUT_NHD}


@dataclass(frozen=True)
class WorkerSettings:
    """Who this worker is, and what it may hold."""

    worker_id: str
    max_seqs: int
    kv_capacity: int  # tokens
    pool_memory: str = "host"  # or "cuda": where this worker's backend can use blocks


class Registrar:
    """Makes the registrations of one life of this process: one boot id, attempts that grow."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self.boot_id = secrets.token_bytes(16)
        self._attempt = 0

    def next_request(
        self, geometry: KvGeometry, lock: WorkerLock, mapped_pool_id: bytes, claims: Sequence[HeldLease]
    ) -> pb.RegisterWorkerRequest:
        """The next attempt, claiming what is still held."""
        self._attempt += 1
        return pb.RegisterWorkerRequest(
            worker_id=self._settings.worker_id,
            boot_id=self.boot_id,
            attempt=self._attempt,
            geometry=geometry_message(geometry),
            max_seqs=self._settings.max_seqs,
            kv_capacity_tokens=self._settings.kv_capacity,
            lock_device=lock.device,
            lock_inode=lock.inode,
            pid=os.getpid(),
            process_start_time_ticks=_process_start_time_ticks(),
            kernel_boot_id=_kernel_boot_id(),
            mapped_pool_id=mapped_pool_id,
            claims=[_claim(held) for held in claims],
        )


def geometry_message(geometry: KvGeometry) -> pb.Geometry:
    """The geometry as it is registered: one group of all layers."""
    group = pb.LayerGroup(
        layer_ids=range(geometry.num_layers),
        kind=pb.LAYER_KIND_FULL_ATTENTION,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
    )
    return pb.Geometry(
        layer_groups=[group],
        kv_dtype=_KV_DTYPES[geometry.kv_dtype],
        layout=_KV_LAYOUTS[geometry.kv_layout],
        model_fingerprint=geometry.model_fingerprint,
    )


def _claim(held: HeldLease) -> pb.Claim:
    return pb.Claim(
        cache_id=held.cache_id,
        block_ids=held.block_ids,
        priority=held.priority,
        tenant=held.tenant,
        age_ticket=held.age_ticket or 0,
    )


def _kernel_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _process_start_time_ticks() -> int:
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:  # not Linux
        return 0
    # Field 22; the second field is the command's name in parentheses, which may hold spaces.
    return int(stat.rsplit(")", 1)[1].split()[19])
