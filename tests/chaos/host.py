"""One host: a manager and its decoders, each at one address for the whole run, however often it is started again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import grpc

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc
from tests.chaos.plan import DECODERS, MANAGER, MAX_PROMPT, MAX_TOKENS, Plan
from tests.e2e.processes import Processes, Service

TTL_S = 1.0
KV_DTYPE = "bf16"


@dataclass(frozen=True)
class Serving:
    """What is served: the same for the disturbed decoders and the undisturbed one."""

    model: Path
    backend: str


@dataclass
class Host:
    """Starts, kills and stops; every life of a process leaves its own log. Use as a context manager."""

    directory: Path
    plan: Plan
    serving: Serving
    running: dict[str, Service] = field(default_factory=dict)
    lives: list[Service] = field(default_factory=list)
    _started: list[Processes] = field(default_factory=list)

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for processes in reversed(self._started):
            processes.__exit__(kind, error, trace)

    @property
    def pool_dir(self) -> Path:
        """Where the manager's files lie."""
        return self.directory / "pool"

    def address(self, name: str) -> str:
        """A socket file: no other process takes it while its owner is down."""
        return f"unix:{self.directory / name}.sock"

    @property
    def decoder_addresses(self) -> list[str]:
        """Where clients go."""
        return [self.address(name) for name in DECODERS]

    async def start(self, name: str) -> None:
        """Starts a process and returns before it serves: a decoder may have to wait for its manager."""
        processes = Processes(self.directory / f"{name}-life-{len(self._started)}")
        self._started.append(processes)
        service = self._spawn(
            processes, name
        )  # not on a thread: whoever cancels this finds it among the processes to end
        self.running[name] = service
        self.lives.append(service)

    def _spawn(self, processes: Processes, name: str) -> Service:
        plan = self.plan
        if name == MANAGER:
            flags = ("--block-size", str(plan.block_size), "--ttl", str(TTL_S), "--hang-limit", "30")
            more = ("--preempt-timeout", "0.5")
            where = {"listen": self.address(name), "pool_dir": self.pool_dir, "num_blocks": plan.num_blocks}
            return processes.start_manager(*flags, *more, wait=False, **where)  # type: ignore[arg-type]
        return processes.start_decoder(
            self.address(MANAGER),
            *("--max-seqs", str(plan.max_seqs), "--max-num-batched-tokens", str(plan.max_num_batched_tokens)),
            *("--kv-dtype", KV_DTYPE, "--grace", "0.5"),
            *("--kv-capacity", str(MAX_PROMPT + MAX_TOKENS), "--reserve", "full" if plan.reserve_full else "grow"),
            model=self.serving.model,
            backend=self.serving.backend,
            listen=self.address(name),
            worker_id=name,
            wait=False,
        )

    async def start_all(self) -> None:
        """The manager first, as `up` does it; returns when all serve."""
        for name in (MANAGER, *DECODERS):
            await self.start(name)
        await self.wait_serving((MANAGER, *DECODERS))

    async def wait_serving(self, names: Sequence[str]) -> None:
        """Returns when they all serve; raises AssertionError with the log of one that ended."""
        for name in names:
            await asyncio.to_thread(self.running[name].wait_serving)

    async def kill(self, name: str) -> None:
        """Its end, now."""
        await asyncio.to_thread(self.running[name].kill)

    async def terminate(self, name: str) -> int:
        """Its end, as it likes it; the exit code."""
        return await asyncio.to_thread(self.running[name].terminate)

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal, if the process lives."""
        if self.running[name].process.poll() is None:
            self.running[name].process.send_signal(number)


class ManagerView:
    """What the manager says of itself, whichever life of it answers."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=(("grpc.max_reconnect_backoff_ms", 200),))
        self._stub = kv_manager_pb2_grpc.KVManagerStub(self._channel)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def stats(self) -> pb.StatsResponse | None:
        """Block counts, which must add up; None while it does not answer."""
        try:
            stats = await self._stub.Stats(pb.StatsRequest(), timeout=2.0)
        except grpc.aio.AioRpcError:
            return None
        total = stats.free + stats.leased + stats.sealed + stats.cached + stats.quarantined
        assert total == stats.num_blocks, f"blocks are not accounted for:\n{stats}"
        assert stats.num_corrupt == 0, f"corrupt blocks:\n{stats}"
        return stats

    async def is_revoked(self, worker_id: str) -> bool:
        """Whether the worker's session is not live."""
        try:
            listed = await self._stub.ListLeases(pb.ListLeasesRequest(worker_id=worker_id), timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
        return any(session.state != "live" for session in listed.sessions)

    async def scrub(self) -> pb.ScrubProgress:
        """The whole pool, checked."""
        last = pb.ScrubProgress()
        async for progress in self._stub.Scrub(pb.ScrubRequest(), timeout=60.0):
            last = progress
        return last

    async def flush(self) -> None:
        """Drops what is cached."""
        await self._stub.Flush(pb.FlushRequest(), timeout=10.0)

    async def leases(self) -> pb.ListLeasesResponse:
        """Who holds what."""
        return await self._stub.ListLeases(pb.ListLeasesRequest(), timeout=10.0)
