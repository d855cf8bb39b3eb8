"""How fast the manager is: `python -m tests.bench.manager_throughput [--seconds S] [--out FILE]`.

A real manager process, pinned to one core where the machine has two, and a load process on the others. Measures table
acquisitions a second in batches of 32 (closed loop, four batches released at a time), the latency of 32 clients in
open loop at 30 % of that, how both change with the number of blocks, and the recovery of a million headers.

On a machine that others use, too, wall-clock figures say little: `per_cpu_second` divides by the CPU time that the
manager itself has used, and `reference_us` is a fixed piece of Python, timed in CPU time beside it: an idle core of a
2024 server takes 45 to 50.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import uvloop

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from services.kv_manager import meta_format as fmt
from services.kv_manager.config import Config
from services.kv_manager.lessor import Lessor
from services.kv_manager.locks import prepare_pool_dir
from services.kv_manager.meta_file import MetaFile
from services.kv_manager.meta_format import Content
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import ROOT, FakeClock, Worker, free_port

BATCH = 32
BLOCKS_A_TABLE = 1
CALLERS = 7  # batches in flight in closed loop
# A decoder acquires as requests come and releases what has ended at a step boundary, all at once. What is held at a time,
# CALLERS * BATCH * BATCHES_A_RELEASE tables of one block, fits into 1000 blocks.
BATCHES_A_RELEASE = 4
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def reference_us() -> float:
    """CPU time of a fixed loop, the median of many: how fast this core is just now."""
    times = []
    for _ in range(2000):
        started = time.process_time_ns()
        sum(number * number for number in range(1000))
        times.append(time.process_time_ns() - started)
    return statistics.median(times) / 1000


class Load:
    """One worker that leases and gives back."""

    def __init__(self, stub: pb_grpc.KVManagerStub, epoch: int, worker_id: str, blocks_a_table: int) -> None:
        self._stub = stub
        self._epoch = epoch
        self._worker_id = worker_id
        self._blocks = blocks_a_table
        self._seq = 0
        self._cache_id = 0
        self.num_refused = 0
        # Calls under way, in the order of their numbers.
        self._pending: dict[int, None] = {}

    def _next_call(self) -> tuple[int, int]:
        """The numbers of a new call: its own, and the one up to which all have ended."""
        self._seq += 1
        self._pending[self._seq] = None
        return self._seq, next(iter(self._pending)) - 1

    async def acquire_batch(self, size: int = BATCH) -> list[int]:
        """Leases size tables, and answers their cache ids."""
        seq, acked_seq = self._next_call()
        ids = list(range(self._cache_id, self._cache_id + size))
        self._cache_id += size
        request = pb.AcquireRequest(
            worker_id=self._worker_id,
            epoch=self._epoch,
            seq=seq,
            acked_seq=acked_seq,
            items=[pb.AcquireItem(cache_id=cache_id, num_blocks=self._blocks) for cache_id in ids],
        )
        reply = await self._stub.Acquire(request, timeout=60)
        del self._pending[seq]
        # In open loop behind a stall, more tables are asked for than a small pool has.
        self.num_refused += sum(not result.HasField("table") for result in reply.results)
        return ids

    async def release_batch(self, ids: list[int]) -> None:
        """Gives the tables back."""
        seq, acked_seq = self._next_call()
        request = pb.ReleaseRequest(
            worker_id=self._worker_id,
            epoch=self._epoch,
            seq=seq,
            acked_seq=acked_seq,
            items=[pb.ReleaseItem(cache_id=cache_id) for cache_id in ids],
        )
        await self._stub.Release(request, timeout=60)
        del self._pending[seq]


async def closed_loop(load: Load, seconds: float, callers: int, size: int = BATCH) -> float:
    """Acquisitions a second with so many calls in flight; with size 0, pairs of empty calls a second."""
    count = 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < end:
            ids: list[int] = []
            for _ in range(BATCHES_A_RELEASE if size else 1):
                ids += await load.acquire_batch(size)
                count += size or 1
            await load.release_batch(ids)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return count / (time.perf_counter() - started)


async def open_loop(load: Load, seconds: float, rate: float, clients: int) -> dict[str, float]:
    """Latencies of acquire batches, in ms, when clients send at a fixed total rate of acquisitions a second."""
    period = clients * BATCH / rate
    latencies: list[float] = []
    started = time.perf_counter()

    async def send(due: float) -> None:
        ids = await load.acquire_batch()
        latencies.append((time.perf_counter() - due) * 1000)
        await load.release_batch(ids)

    async def client(index: int) -> None:
        due = started + period * index / clients
        calls = []
        while due < started + seconds:
            await asyncio.sleep(due - time.perf_counter())
            calls.append(asyncio.create_task(send(due)))
            due += period
        await asyncio.gather(*calls)

    await asyncio.gather(*(client(index) for index in range(clients)))
    latencies.sort()
    return {f"p{q}_ms": round(latencies[int(len(latencies) * q / 100)], 2) for q in (50, 90, 99)}


def measure(num_blocks: int, seconds: float) -> dict[str, Any]:
    """One size of pool: throughput and latency."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "services.kv_manager", "--pool-dir", directory, "--listen", address]
        command += ["--num-blocks", str(num_blocks), "--log-level", "warning", "--ttl", "3600", "--hang-limit", "3600"]
        process = subprocess.Popen(command, cwd=ROOT)
        cores = sorted(os.sched_getaffinity(0))
        try:
            if len(cores) > 1:
                os.sched_setaffinity(process.pid, cores[:1])
                os.sched_setaffinity(0, cores[1:])
            figures = uvloop.run(drive(address, Path(directory), process.pid, seconds))
        finally:
            os.sched_setaffinity(0, cores)
            process.terminate()
            process.wait(30)
    return {"num_blocks": num_blocks, **figures}


async def drive(address: str, pool_dir: Path, pid: int, seconds: float) -> dict[str, Any]:
    """Puts load on a manager process, and measures."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.KVManagerStub(channel)
        await stub.DescribePool(pb.DescribePoolRequest(), timeout=30, wait_for_ready=True)
        worker = Worker(pool_dir, kv_capacity_tokens=1 << 20).lock()
        epoch = (await stub.RegisterWorker(worker.request(), timeout=60)).epoch
        load = Load(stub, epoch, "w1", BLOCKS_A_TABLE)
        await closed_loop(load, 1.0, CALLERS)
        before, started = cpu_seconds(pid), time.perf_counter()
        rate = await closed_loop(load, seconds, CALLERS)
        wall = time.perf_counter() - started
        cpu = cpu_seconds(pid) - before
        before = cpu_seconds(pid)
        pairs = await closed_loop(load, seconds / 2, CALLERS, size=0)
        empty_us = (cpu_seconds(pid) - before) / (pairs * seconds / 2) / 2 * 1e6
        latency = await open_loop(load, seconds, 0.3 * rate, 32)
        worker.die()
    return {
        "acquisitions_per_s": round(rate),
        "per_cpu_second": round(rate * wall / cpu),
        "manager_cpu_share": round(cpu / wall, 2),
        "empty_call_cpu_us": round(empty_us),
        "reference_us": round(reference_us(), 1),
        "num_refused": load.num_refused,
        **latency,
    }


def measure_recovery(num_blocks: int) -> dict[str, Any]:
    """Seconds to read back num_blocks headers, all of sealed blocks in chains of 64."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        pool_dir = prepare_pool_dir(Path(directory))
        config, clock = Config(pool_dir=pool_dir, num_blocks=num_blocks), FakeClock()
        lessor = Lessor(config, pool_dir, clock)
        worker = Worker(pool_dir).lock()
        lessor.register(registration(worker.request()))
        assert lessor.pool is not None
        path = lessor.pool.files.meta.path
        lessor.close()
        worker.die()
        meta, parent = MetaFile(path), fmt.NO_HASH
        for block in range(num_blocks):
            content_hash = secrets.token_bytes(32)
            content = Content(content_hash, parent if block % 64 else fmt.NO_HASH, 16, block, fmt.NO_TENANT, 1)
            meta.write_sealed(block, 0, content)
            parent = content_hash
        meta.close()
        started, cpu = time.perf_counter(), time.process_time()
        lessor = Lessor(config, pool_dir, clock)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        assert lessor.pool is not None
        assert len(lessor.pool.cached_blocks()) == num_blocks
        lessor.close()
        return {"num_blocks": num_blocks, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def main() -> None:
    """Measures everything, prints it as JSON, and writes it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--sizes", default="1000,30000,1000000", help="numbers of blocks")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "load_average": os.getloadavg()[0],
        "sizes": [measure(int(size), args.seconds) for size in args.sizes.split(",")],
        "recovery": measure_recovery(max(int(size) for size in args.sizes.split(","))),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
