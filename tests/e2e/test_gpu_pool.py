"""A pool in GPU memory over real processes, sockets and deaths; host memory stands in for the GPU's, and a fake model for kernels."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import kv_manager_pb2 as pb
from protos import kv_manager_pb2_grpc
from protos.pool_handover import REFUSED, SOCKET_NAME, Ask, receive_answer, send_ask
from tests.decoder.engine_fakes import expected_tokens, make_request
from tests.e2e.processes import DEADLINE_S, ROOT, Manager, Processes, until

NUM_PROMPT, MAX_TOKENS = 70, 30  # tokens; 100 in all are 6 full blocks
CACHED = 64  # tokens of the full blocks of a prompt


class Worker:
    """One process of tests/decoder/stand_in_worker.py."""

    def __init__(self, address: str, worker_id: str) -> None:
        self.worker_id = worker_id
        argv = [sys.executable, "-m", "tests.decoder.stand_in_worker", address, worker_id]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def hear(self, event: str) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert said["event"] == event
        return said

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, request_id: str, prompt: str) -> int:
        """Runs a request, whose tokens must be those of an undisturbed run; the number of tokens that were found in the cache."""
        self.say(f"run {request_id} {prompt} {NUM_PROMPT} {MAX_TOKENS}")
        return self._end(prompt)

    def go(self, prompt: str) -> int:
        """Lets the request that is held end; see `run`."""
        self.say("go")
        return self._end(prompt)

    def _end(self, prompt: str) -> int:
        said = self.hear("done")
        assert said["tokens"] == expected_tokens(make_request(prompt, NUM_PROMPT, MAX_TOKENS))
        return int(said["cached"])

    def hold(self, request_id: str, prompt: str) -> None:
        """Starts a request, and returns when one of its steps is under way."""
        self.say(f"hold {request_id} {prompt} {NUM_PROMPT} {MAX_TOKENS}")
        self.hear("held")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Host:
    """A manager and its workers."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.manager = self._start()
        self.workers: list[Worker] = []

    def _start(self, **again: Any) -> Manager:
        return self._processes.start_manager(
            "--pool-memory", "cuda", num_blocks=64, module="tests.kv_manager.stand_in_manager", **again
        )

    def kill_manager(self) -> None:
        self.manager.kill()

    def restart_manager(self) -> None:
        self.manager = self._start(listen=self.manager.address, pool_dir=self.manager.pool_dir)

    def worker(self, worker_id: str) -> Worker:
        """A worker that is ready."""
        worker = Worker(self.manager.address, worker_id)
        self.workers.append(worker)
        worker.hear("ready")
        return worker

    def describe(self) -> pb.DescribePoolResponse:
        with grpc.insecure_channel(self.manager.address) as channel:
            stub = kv_manager_pb2_grpc.KVManagerStub(channel)
            return stub.DescribePool(pb.DescribePoolRequest(), timeout=DEADLINE_S)

    def until_back(self) -> None:
        until(lambda: not self.describe().memory_is_absent, "a worker brings the memory back")


@pytest.fixture
def host(processes: Processes) -> Iterator[Host]:
    started = Host(processes)
    yield started
    for worker in started.workers:
        worker.kill()


def test_workers_share_the_memory_and_hand_it_back_to_a_manager_that_was_killed(host: Host) -> None:
    first = host.worker("w1")
    assert host.describe().pool_memory == "cuda"
    assert first.run("a", "prompt") == 0
    second = host.worker("w2")
    assert second.run("b", "prompt") == CACHED  # the first's own blocks: they share one memory
    first.hold("c", "other")
    host.kill_manager()
    host.restart_manager()
    host.until_back()
    assert host.manager.events("the GPU memory is back")
    assert first.go("other") == 0  # what was under way at the kill ends in the blocks that it holds
    third = host.worker("w3")
    assert third.run("d", "prompt") == CACHED  # after its checksum was verified
    assert third.run("e", "other") == CACHED
    assert host.manager.stats().num_corrupt == 0
    host.manager.wait_all_free()


def test_a_killed_workers_blocks_come_back_when_its_process_is_gone_and_its_prefixes_are_found(host: Host) -> None:
    first, second = host.worker("w1"), host.worker("w2")
    assert first.run("a", "prompt") == 0
    first.hold("b", "held")
    assert host.manager.stats().num_leases == 1
    first.kill()
    host.manager.wait_all_free()
    assert [event["why"] for event in host.manager.events("session ended")] == ["its process is gone"]
    assert second.run("c", "prompt") == CACHED
    # Killed while no manager runs: its slot names its process, which is gone when the next one starts.
    second.hold("d", "held-too")
    third = host.worker("w3")
    host.kill_manager()
    second.kill()
    host.restart_manager()
    host.until_back()
    host.manager.wait_all_free()
    assert third.run("e", "prompt") == CACHED
    assert host.describe().num_lost_pools == 0


def test_with_no_worker_alive_the_cache_is_gone_and_a_new_pool_is_made(host: Host) -> None:
    first = host.worker("w1")
    assert first.run("a", "prompt") == 0
    old = host.describe().pool.pool_id
    host.kill_manager()
    first.kill()
    host.restart_manager()
    assert host.describe().num_lost_pools == 1
    assert not host.describe().HasField("pool")
    [said] = [line for line in host.manager.log().splitlines() if "the GPU cache is gone" in line]
    assert old.hex() in said
    second = host.worker("w2")
    assert host.describe().pool.pool_id != old
    assert second.run("b", "prompt") == 0
    assert second.run("c", "prompt") == CACHED


def test_a_worker_that_waits_for_lost_memory_gets_a_new_pool(host: Host) -> None:
    first = host.worker("w1")
    assert first.run("a", "prompt") == 0
    first.process.send_signal(19)  # SIGSTOP: alive, so the memory may come back
    host.kill_manager()
    host.restart_manager()
    assert host.describe().memory_is_absent
    second = Worker(host.manager.address, "w2")
    host.workers.append(second)
    until(lambda: any(s.worker_id == "w2" for s in sessions(host)), "the second worker registers")
    assert host.describe().memory_is_absent  # it has none to bring
    first.kill()
    second.hear("ready")
    assert second.run("b", "prompt") == 0
    assert host.describe().num_lost_pools == 1


def sessions(host: Host) -> list[pb.Session]:
    with grpc.insecure_channel(host.manager.address) as channel:
        return list(
            kv_manager_pb2_grpc.KVManagerStub(channel).ListLeases(pb.ListLeasesRequest(), timeout=DEADLINE_S).sessions
        )


def test_only_the_registered_process_itself_gets_the_memory(host: Host) -> None:
    first = host.worker("w1")
    socket_path = host.manager.pool_dir / SOCKET_NAME
    assert socket_path.stat().st_mode & 0o777 == 0o600
    ask = Ask("w1", host.describe().pool.pool_id.hex())
    for pidfd in (os.pidfd_open(os.getpid()), os.pidfd_open(first.process.pid), os.open(os.devnull, os.O_RDONLY)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(socket_path))
            send_ask(connection, ask, [pidfd])
            answer, fds = receive_answer(connection)
        os.close(pidfd)
        assert (answer.status, fds) == (REFUSED, [])


def test_backends_and_pools_that_do_not_fit_are_refused_by_name(host: Host, processes: Processes) -> None:
    decoder = processes.start_decoder(host.manager, "--kv-dtype", "f32", backend="mlx", wait=False)
    assert decoder.wait_exit() == 2
    assert "has its pool in GPU memory" in decoder.log()
    assert "use --backend cuda here" in decoder.log()


def test_a_manager_without_a_gpu_says_so(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "services.kv_manager",
        "--pool-dir",
        str(tmp_path),
        "--pool-memory",
        "cuda",
        "--device",
        "99",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--pool-memory cuda: " in done.stderr
    assert "or use --pool-memory host" in done.stderr
