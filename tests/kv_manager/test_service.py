"""The manager as a process: what it answers over a socket, and what starts, stops, kills and hangs do to it."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc as pb_grpc
from protos import rich_status
from tests.kv_manager.helpers import ManagerProcess, Worker, rich_status_of, run_manager, wait_until, while_live

StartManager = Callable[..., ManagerProcess]

# Takes the lock, says so with its pid, device and inode, and holds it until it ends.
HOLD_LOCK = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
stat = os.fstat(fd)
print(stat.st_dev, stat.st_ino, flush=True)
sys.stdin.read()
"""


class Child:
    """A worker's process: it holds the lock, and the test speaks for it."""

    def __init__(self, pool_dir: Path, worker_id: str) -> None:
        path = pool_dir / "workers" / f"{worker_id}.lock"
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        device, inode = self.process.stdout.readline().split()
        self.identity = (int(device), int(inode))
        self.worker_id = worker_id

    def request(self) -> pb.RegisterWorkerRequest:
        request = Worker(Path("/"), self.worker_id, fd=0).request()
        request.lock_device, request.lock_inode = self.identity
        request.pid = self.process.pid
        return request

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def start_child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(pool_dir: Path, worker_id: str = "w1") -> Child:
        children.append(Child(pool_dir, worker_id))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def acquire(
    stub: pb_grpc.KVManagerStub, epoch: int, seq: int, *items: tuple[int, int], worker_id: str = "w1"
) -> pb.AcquireResponse:
    return stub.Acquire(
        pb.AcquireRequest(
            worker_id=worker_id,
            epoch=epoch,
            seq=seq,
            acked_seq=seq - 1,
            items=[pb.AcquireItem(cache_id=cache_id, num_blocks=count) for cache_id, count in items],
        ),
        timeout=10,
    )


def stats(stub: pb_grpc.KVManagerStub) -> pb.StatsResponse:
    return stub.Stats(pb.StatsRequest(), timeout=10)


def test_a_worker_leases_extends_and_releases_over_the_wire(manager_process: StartManager) -> None:
    manager = manager_process("--num-blocks", "8")
    with manager.stub() as stub:
        described = stub.DescribePool(pb.DescribePoolRequest(), timeout=10)
        assert not described.HasField("pool")
        assert described.pool_dir == str(manager.pool_dir)
        worker = Worker(Path(described.pool_dir)).lock()
        registered = stub.RegisterWorker(worker.request(), timeout=10)
        assert (registered.ttl_ms, registered.keepalive_interval_ms) == (10_000, 2_000)
        assert registered.pool == stub.DescribePool(pb.DescribePoolRequest(), timeout=10).pool
        assert os.stat(registered.pool.kv_path).st_size == 4096 + 8 * registered.pool.block_stride_bytes
        answer = acquire(stub, registered.epoch, 1, (1, 2), (2, 7), (1, 2), (3, 3))
        kinds = [result.WhichOneof("result") for result in answer.results]
        assert kinds == ["table", "error", "table", "table"]
        assert list(answer.results[2].table.block_ids) == [0, 1]
        assert list(answer.results[3].table.block_ids) == [2, 3, 4]
        error = rich_status.error_info(answer.results[1].error)
        assert (error.domain, error.reason, error.metadata["cache_id"]) == ("leasehold", "POOL_EXHAUSTED", "2")
        extended = stub.Extend(
            pb.ExtendRequest(
                worker_id="w1",
                epoch=registered.epoch,
                seq=2,
                acked_seq=1,
                items=[pb.ExtendItem(cache_id=1, num_blocks=3), pb.ExtendItem(cache_id=9, num_blocks=1)],
            ),
            timeout=10,
        )
        assert list(extended.results[0].table.block_ids) == [0, 1, 5]
        assert rich_status.error_info(extended.results[1].error).reason == "UNKNOWN_LEASE"
        listed = stub.ListLeases(pb.ListLeasesRequest(), timeout=10)
        assert [lease.cache_id for lease in listed.leases] == [1, 3]
        assert [(session.worker_id, session.state, session.num_blocks) for session in listed.sessions] == [
            ("w1", "live", 6)
        ]
        mapped = stub.ListLeases(pb.ListLeasesRequest(with_block_states=True), timeout=10)
        assert list(mapped.block_states) == [1, 1, 1, 1, 1, 1, 0, 0]
        release = pb.ReleaseRequest(
            worker_id="w1",
            epoch=registered.epoch,
            seq=3,
            acked_seq=2,
            items=[pb.ReleaseItem(cache_id=c) for c in (1, 3)],
        )
        assert stub.Release(release, timeout=10).num_freed_blocks == 6
        assert stub.Release(release, timeout=10).num_freed_blocks == 0
        assert stats(stub).free == 8
        worker.die()


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (pb.AcquireRequest(worker_id="w1", epoch=1, seq=1), grpc.StatusCode.ABORTED, "STALE_EPOCH"),
        (pb.AcquireRequest(worker_id="w1", epoch=1), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (pb.AcquireRequest(worker_id="w1", seq=3, acked_seq=3), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (
            pb.AcquireRequest(worker_id="w1", seq=1, items=[pb.AcquireItem(cache_id=1)]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REQUEST",
        ),
    ],
)
def test_a_call_that_cannot_be_served_fails_whole_with_a_rich_status(
    manager_process: StartManager, request_: pb.AcquireRequest, code: grpc.StatusCode, reason: str
) -> None:
    with manager_process().stub() as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Acquire(request_, timeout=10)
        assert caught.value.code() is code
        assert rich_status.error_info(rich_status_of(caught.value)).reason == reason


def test_health_and_reflection_name_the_service(manager_process: StartManager) -> None:
    manager = manager_process()
    with grpc.insecure_channel(manager.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "leasehold.v1.KVManager"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        reply = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=10))
        names = {service.name for service in reply.list_services_response.service}
        assert {"leasehold.v1.KVManager", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_with_streams_open(manager_process: StartManager, number: signal.Signals) -> None:
    manager = manager_process("--num-blocks", "8")
    with manager.stub() as stub:
        worker = Worker(manager.pool_dir).lock()
        epoch = stub.RegisterWorker(worker.request(), timeout=10).epoch
        requests: queue.Queue[pb.KeepAliveRequest] = queue.Queue()
        requests.put(pb.KeepAliveRequest(worker_id="w1", epoch=epoch))
        replies = stub.KeepAlive(iter(requests.get, None))
        assert next(replies).epoch == epoch
        assert manager.send(number) == 0
        worker.die()
    assert manager.start().send(signal.SIGTERM) == 0


def test_a_second_manager_on_the_pool_dir_is_refused(manager_process: StartManager) -> None:
    manager = manager_process()
    status, stderr = run_manager("--listen", "127.0.0.1:0", "--pool-dir", str(manager.pool_dir))
    assert status == 1
    assert "another manager serves" in stderr
    with manager.stub() as stub:
        assert stats(stub).num_blocks == 0


def test_a_port_that_is_taken_is_refused_by_name(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, stderr = run_manager("--listen", address, "--pool-dir", str(tmp_path / "other"))
    assert status == 1
    assert f"cannot listen on {address}" in stderr


def test_a_unix_socket_serves(manager_process: StartManager) -> None:
    manager = manager_process()
    assert manager.address.startswith("unix:/")
    with manager.stub() as stub:
        assert stats(stub).num_sessions == 0


def test_a_bad_flag_ends_it_with_status_2_before_anything_is_made(tmp_path: Path) -> None:
    status, stderr = run_manager("--pool-dir", str(tmp_path / "pool"), "--block-size", "17")
    assert status == 2
    assert "--block-size" in stderr
    assert not (tmp_path / "pool").exists()


def test_a_pool_dir_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, stderr = run_manager("--pool-dir", str(tmp_path / "file" / "pool"), "--listen", "127.0.0.1:0")
    assert status == 1
    assert "--pool-dir" in stderr


def test_kill_9_and_restart_let_a_living_worker_claim_what_it_holds(
    manager_process: StartManager, start_child: Callable[..., Child]
) -> None:
    manager = manager_process("--num-blocks", "8")
    child = start_child(manager.pool_dir)
    with manager.stub() as stub:
        registered = stub.RegisterWorker(child.request(), timeout=10)
        acquire(stub, registered.epoch, 1, (1, 2), (2, 2))
    manager.kill()
    manager.start()
    with manager.stub() as stub:
        assert (stats(stub).quarantined, stats(stub).free) == (4, 4)
        states = [session.state for session in stub.ListLeases(pb.ListLeasesRequest(), timeout=10).sessions]
        assert states == ["absent"]
        child.kill()
        wait_until(lambda: stats(stub).free == 8, what="the dead worker's blocks coming back")


def test_a_stopped_worker_is_quarantined_and_killed_while_stopped_its_blocks_come_back(
    manager_process: StartManager, start_child: Callable[..., Child]
) -> None:
    manager = manager_process("--num-blocks", "8", "--ttl", "0.5")
    child = start_child(manager.pool_dir)
    with manager.stub() as stub:
        epoch = stub.RegisterWorker(child.request(), timeout=10).epoch
        while_live(stub, "w1", epoch, lambda: acquire(stub, epoch, 1, (1, 8)))
        child.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: stats(stub).quarantined == 8, what="the quarantine")
        second = Worker(manager.pool_dir, "w2").lock()
        second_epoch = stub.RegisterWorker(second.request(), timeout=10).epoch
        refused = while_live(
            stub, "w2", second_epoch, lambda: acquire(stub, second_epoch, 1, (1, 1), worker_id="w2").results[0]
        )
        assert rich_status.error_info(refused.error).reason == "POOL_EXHAUSTED"
        child.kill()
        wait_until(lambda: stats(stub).free == 8, what="the dead worker's blocks coming back")
        second.die()


def test_a_stopped_worker_that_goes_on_hears_of_its_revocation(
    manager_process: StartManager, start_child: Callable[..., Child]
) -> None:
    manager = manager_process("--num-blocks", "8", "--ttl", "0.5")
    child = start_child(manager.pool_dir)
    with manager.stub() as stub:
        epoch = stub.RegisterWorker(child.request(), timeout=10).epoch
        while_live(stub, "w1", epoch, lambda: acquire(stub, epoch, 1, (1, 3)))
        wait_until(lambda: stats(stub).quarantined == 3, what="the quarantine")
        keepalive = pb.KeepAliveRequest(worker_id="w1", epoch=epoch)
        assert list(next(stub.KeepAlive(iter([keepalive]), timeout=10)).revoked_cache_ids) == [1]
        with pytest.raises(grpc.RpcError) as caught:
            acquire(stub, epoch, 2, (2, 1))
        assert rich_status.error_info(rich_status_of(caught.value)).reason == "SESSION_REVOKED"
        release = pb.ReleaseRequest(worker_id="w1", epoch=epoch, seq=3, items=[pb.ReleaseItem(cache_id=1)])
        assert stub.Release(release, timeout=10).num_freed_blocks == 3
        assert list(next(stub.KeepAlive(iter([keepalive]), timeout=10)).revoked_cache_ids) == []
        again = while_live(stub, "w1", epoch, lambda: acquire(stub, epoch, 4, (2, 1)).results[0])
        assert len(again.table.block_ids) == 1


def test_a_stream_of_a_stale_epoch_is_aborted(manager_process: StartManager) -> None:
    with manager_process().stub() as stub:
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.KeepAlive(iter([pb.KeepAliveRequest(worker_id="w1", epoch=5)]), timeout=10))
        assert rich_status.error_info(rich_status_of(caught.value)).reason == "STALE_EPOCH"


def test_a_stopped_manager_revokes_nobody_when_it_goes_on(
    manager_process: StartManager, start_child: Callable[..., Child]
) -> None:
    manager = manager_process("--num-blocks", "8", "--ttl", "5")
    child = start_child(manager.pool_dir)
    with manager.stub() as stub:
        epoch = stub.RegisterWorker(child.request(), timeout=10).epoch
        acquire(stub, epoch, 1, (1, 3))
        assert manager.process is not None
        manager.process.send_signal(signal.SIGSTOP)
        pause = subprocess.Popen([sys.executable, "-c", "import select; select.select([], [], [], 6)"])
        pause.wait(30)
        manager.process.send_signal(signal.SIGCONT)
        assert (stats(stub).leased, stats(stub).num_revoked) == (3, 0)


WITHOUT_MLX = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "numpy", "mlx_lm", "safetensors", "tokenizers"):
            raise ImportError(f"{name} is not to be imported by the manager")
sys.meta_path.insert(0, Blocker())
sys.argv = ["kv_manager", *sys.argv[1:]]
from services.kv_manager.__main__ import main
status = main()
assert not {"mlx", "numpy"} & set(sys.modules)
sys.exit(status)
"""


def test_it_imports_and_serves_where_there_is_no_mlx_and_no_numpy(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/manager.sock"
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_MLX, "--listen", address, "--pool-dir", str(tmp_path), "--num-blocks", "4"],
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.KVManagerStub(channel)
            stub.DescribePool(pb.DescribePoolRequest(), timeout=30, wait_for_ready=True)
            worker = Worker(tmp_path).lock()
            epoch = stub.RegisterWorker(worker.request(), timeout=10).epoch
            assert len(acquire(stub, epoch, 1, (1, 4)).results[0].table.block_ids) == 4
            worker.die()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(30)


def test_help_answers_without_a_pool_dir() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "services.kv_manager", "--help"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"--pool-dir" in process.stdout
