"""The manager's settings: command-line flags only, checked before anything is opened."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.logs import LOG_LEVELS
from services.metrics import check_metrics_address
from services.serving import check_address

DEFAULT_LISTEN = "127.0.0.1:50050"
MAX_NUM_BLOCKS = 1 << 28  # the headers alone are 32 GiB then
MAX_BLOCK_SIZE = 256
ANY_TENANT = "*"
POOL_MEMORIES = ("host", "cuda")

_SIZE = re.compile(r"^(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?$", re.IGNORECASE)
_UNIT_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Config:
    """Everything that the manager is told; sizes in bytes, times in seconds."""

    pool_dir: Path
    listen: str = DEFAULT_LISTEN
    num_blocks: int | None = None
    pool_bytes: int | None = None
    block_size: int = 16
    ttl_s: float = 10.0
    hang_limit_s: float = 120.0
    preempt_timeout_s: float = 2.0
    scrub_bytes_per_s: int = 0  # 0: only on demand
    # Blocks that a tenant's leases may hold; ANY_TENANT for every tenant that is not named.
    tenant_quotas: Mapping[str, int] = field(default_factory=dict)
    log_level: str = "info"
    metrics_listen: str | None = None
    pool_memory: str = "host"  # or "cuda"
    device: int = 0  # of the CUDA devices that this process sees

    def __post_init__(self) -> None:
        """Raises ValueError naming the flag when a value cannot be served."""
        check_address("--listen", self.listen)
        if self.metrics_listen is not None:
            check_metrics_address(self.metrics_listen)
        if self.pool_memory not in POOL_MEMORIES:
            raise ValueError(f"--pool-memory: {self.pool_memory!r} is not one of {', '.join(POOL_MEMORIES)}")
        if self.device < 0 or (self.device and self.pool_memory == "host"):
            raise ValueError(
                f"--device: {self.device} is the number of a GPU, from 0, and goes with --pool-memory cuda"
            )
        if not str(self.pool_dir).strip():
            raise ValueError("--pool-dir: is empty; name a directory on tmpfs (fast) or on disk (survives a reboot)")
        if self.num_blocks is not None and self.pool_bytes is not None:
            raise ValueError("--num-blocks and --pool-bytes exclude each other: give the size once")
        if self.num_blocks is not None and not 1 <= self.num_blocks <= MAX_NUM_BLOCKS:
            raise ValueError(f"--num-blocks: {self.num_blocks} is not within 1 to {MAX_NUM_BLOCKS}")
        if self.pool_bytes is not None and self.pool_bytes < 1:
            raise ValueError(f"--pool-bytes: {self.pool_bytes} is not a positive number of bytes")
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise ValueError(f"--block-size: {self.block_size} is not a power of two within 1 to {MAX_BLOCK_SIZE}")
        if not 0.1 <= self.ttl_s <= 3600:
            raise ValueError(f"--ttl: {self.ttl_s:g} s is not within 0.1 to 3600")
        if not self.ttl_s <= self.hang_limit_s <= 86400:
            raise ValueError(
                f"--hang-limit: {self.hang_limit_s:g} s is not within --ttl ({self.ttl_s:g}) to 86400; it must be"
                " longer than the decoders' longest step"
            )
        if not 0.05 <= self.preempt_timeout_s <= 3600:
            raise ValueError(f"--preempt-timeout: {self.preempt_timeout_s:g} s is not within 0.05 to 3600")
        for tenant, quota in self.tenant_quotas.items():
            if quota < 1:
                raise ValueError(f"--tenant-quota: {tenant!r} has {quota} blocks, and needs at least 1")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"--log-level: {self.log_level!r} is not one of {', '.join(LOG_LEVELS)}")

    def quota_of(self, tenant: str) -> int | None:
        """Blocks that the tenant's leases may hold, or None for any number."""
        return self.tenant_quotas.get(tenant, self.tenant_quotas.get(ANY_TENANT))

    @property
    def keepalive_interval_s(self) -> float:
        """How often workers should send a keepalive: five may be lost before a session is revoked."""
        return self.ttl_s / 5


def parse_size(text: str) -> int:
    """Bytes of a size such as 4096, 512MiB or 2GB; raises ValueError for anything else."""
    match = _SIZE.match(text.strip())
    if match is None or (match["binary"] and not match["unit"]):
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    base = 1024 if match["binary"] else 1000
    return int(float(match["number"]) * base ** _UNIT_POWER[match["unit"].upper()])


def _size_argument(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _quota_argument(text: str) -> tuple[str, int]:
    tenant, separator, number = text.rpartition("=")
    if not separator or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not TENANT=BLOCKS, such as alice=512 or *=256")
    return tenant, int(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # a script that says --pool must not change its meaning with the next flag
        prog="python -m services.kv_manager",
        description="Owns one pool of KV-cache blocks on this host and leases its blocks to decoders.",
        epilog=(
            "The pool is made when the first decoder registers, because only then its geometry is known. Its size comes"
            " from --num-blocks, from --pool-bytes, or else from that decoder's --max-seqs x ceil(kv_capacity /"
            " block_size). One manager serves one pool directory; for another model, use another directory."
        ),
    )
    add = parser.add_argument
    add("--listen", default=DEFAULT_LISTEN, metavar="ADDR", help="HOST:PORT or unix:PATH (default %(default)s)")
    add(
        "--pool-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the pool files and the workers' lock files lie: tmpfs for speed, a disk to survive a reboot",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--num-blocks", type=int, metavar="N", help="size of the pool in blocks")
    size.add_argument(
        "--pool-bytes", type=_size_argument, metavar="SIZE", help="size of the pool in bytes, such as 512MiB or 2GiB"
    )
    add("--block-size", type=int, default=16, metavar="TOKENS", help="tokens a block, a power of two (default 16)")
    add(
        "--pool-memory",
        choices=POOL_MEMORIES,
        default="host",
        help="where the K/V bytes are: in a file in --pool-dir, or in the memory of an NVIDIA GPU, for decoders with --backend"
        " cuda; that lasts as long as this manager or one of its decoders lives (default %(default)s)",
    )
    add("--device", type=int, default=0, metavar="N", help="the GPU of --pool-memory cuda (default %(default)s)")
    _add_limits(parser)
    add("--metrics-listen", metavar="HOST:PORT", help="serve Prometheus metrics at http://HOST:PORT/metrics (off)")
    add("--log-level", choices=sorted(LOG_LEVELS), default="info", help="what to log on stderr (default info)")
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """How long a decoder may be silent, a lease may take to give way, and what one tenant may hold."""
    add = parser.add_argument
    add(
        "--ttl",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds after which a silent decoder is revoked: its blocks are set aside, never reused while it may"
        " live (default %(default)g)",
    )
    add(
        "--hang-limit",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds after which a decoder stuck in one step is revoked; longer than the longest step"
        " (default %(default)g)",
    )
    add(
        "--preempt-timeout",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds that a lease has to give way to an older one before another is chosen (default %(default)g)",
    )
    add(
        "--scrub-rate",
        type=_size_argument,
        default=0,
        metavar="SIZE",
        help="bytes a second at which sealed blocks are verified in the background (default: only on demand)",
    )
    add(
        "--tenant-quota",
        type=_quota_argument,
        action="append",
        default=[],
        metavar="TENANT=BLOCKS",
        help="blocks that the leases of one tenant may hold, * for every other tenant; may be repeated",
    )


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The settings of a command line; prints usage and exits with status 2 when a flag is wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return Config(
            pool_dir=args.pool_dir,
            listen=args.listen,
            num_blocks=args.num_blocks,
            pool_bytes=args.pool_bytes,
            block_size=args.block_size,
            ttl_s=args.ttl,
            hang_limit_s=args.hang_limit,
            preempt_timeout_s=args.preempt_timeout,
            scrub_bytes_per_s=args.scrub_rate,
            tenant_quotas=dict(args.tenant_quota),
            log_level=args.log_level,
            metrics_listen=args.metrics_listen,
            pool_memory=args.pool_memory,
            device=args.device,
        )
    except ValueError as error:
        parser.error(str(error))
