"""A step never copies the pool: the peak memory of both services stays flat while a large one is decoded in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Pace, follow, token_request
from tests.e2e.processes import Processes, Service

POOL_BYTES = 1 << 30
NUM_SEQS = 8
NUM_STEPS = 200
WARM_UP_STEPS = 60
# A 32nd of the pool: noise of allocators, and the blocks that are written.
ALLOWED_BYTES = 32 << 20


def _status_bytes(service: Service, name: str) -> int:
    for line in Path(f"/proc/{service.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/PID/status")


def _anonymous_bytes(service: Service) -> int:
    for line in Path(f"/proc/{service.process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in /proc/PID/smaps_rollup")


def _reset_peak(service: Service) -> int:
    """From now on VmHWM is the peak of what follows; the present size."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")
    return _status_bytes(service, "VmRSS")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read off /proc")
async def test_peak_memory_over_200_steps_with_a_pool_of_1_gib_stays_flat(processes: Processes, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", TinyConfig(), 9)
    manager = processes.start_manager("--pool-bytes", str(POOL_BYTES), num_blocks=None)
    decoder = processes.start_decoder(manager, "--kv-dtype", "f32", model=model)
    services: tuple[Service, ...] = (manager, decoder)
    pace = Pace()
    async with DecoderClient(decoder.address) as client:
        requests = [token_request([5, index], WARM_UP_STEPS + NUM_STEPS + 20) for index in range(NUM_SEQS)]
        streams = [asyncio.create_task(follow(client, request, pace=pace)) for request in requests]
        await pace.reach(NUM_SEQS * WARM_UP_STEPS)
        sizes = [_reset_peak(service) for service in services]
        anonymous = [_anonymous_bytes(service) for service in services]
        await pace.reach(NUM_SEQS * (WARM_UP_STEPS + NUM_STEPS))
        peaks = [_status_bytes(service, "VmHWM") for service in services]
        anonymous_after = [_anonymous_bytes(service) for service in services]
        await asyncio.gather(*streams)
    assert manager.stats().num_blocks * 3 * 2 * 2 * 16 * 16 * 4 == pytest.approx(POOL_BYTES, rel=0.01)
    for index, service in enumerate(services):
        assert peaks[index] - sizes[index] < ALLOWED_BYTES, service.service_name
        assert anonymous_after[index] - anonymous[index] < ALLOWED_BYTES, service.service_name
    manager.wait_all_free()
