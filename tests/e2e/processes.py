"""Real services as child processes, for every end-to-end test: started on free ports, awaited, killed, never left behind.

Use the `processes` fixture (tests/e2e/conftest.py), or `Processes` as a context manager for fixtures of a wider scope.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from protos import decoder_pb2_grpc, kv_manager_pb2, kv_manager_pb2_grpc
from services.healthcheck import is_serving

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "services" / "decoder" / "demo_model" / "checkpoint"
DEADLINE_S = 60.0

# What gRPC prints when its server stops in the moment that a call arrives: nothing of ours is in it.
_GRPC_AT_ITS_END = re.compile(
    r"Traceback \(most recent call last\):\n  File .*_schedule_rpc_coro\nasyncio\.exceptions\.CancelledError\n"
)

_SILENT = re.compile(r"silent for ([0-9.]+) s$")

MANAGER_SERVICE = "leasehold.v1.KVManager"
DECODER_SERVICE = "leasehold.v1.Decoder"


def until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls a condition; raises AssertionError naming `what` when it does not come true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.02)


def silent_s(revoked: Mapping[str, Any]) -> float:
    """For how many seconds the worker had been silent whose revocation this line of the manager's log tells; 0: it was hung."""
    silent = _SILENT.match(revoked["why"])
    return float(silent[1]) if silent else 0.0


@dataclass
class Service:
    """One child process, and its log lines in a file."""

    process: subprocess.Popen[bytes]
    log_path: Path
    service_name: str
    address: str = ""  # known once it serves

    def log(self) -> str:
        """Everything it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def has_traceback(self) -> bool:
        """Whether it logged an exception of ours."""
        return "Traceback" in _GRPC_AT_ITS_END.sub("", self.log())

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its structured log lines of one event."""
        found: list[dict[str, Any]] = []
        for line in self.log().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == name:
                    found.append(entry)
        return found

    def wait_serving(self, deadline_s: float = DEADLINE_S) -> None:
        """Returns when its health is SERVING; raises AssertionError with its log when it ends before."""

        def serves() -> bool:
            code = self.process.poll()
            assert code is None, f"{self.service_name} ended with {code}:\n{self.log()}"
            if not self.address:
                serving = self.events("serving")
                self.address = serving[-1]["address"] if serving else ""
            return bool(self.address) and is_serving(self.address, self.service_name, 5.0)

        until(serves, f"{self.service_name} serves", deadline_s)

    def wait_exit(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit code; negative for a signal."""
        return self.process.wait(deadline_s)

    def terminate(self, number: int = signal.SIGTERM, deadline_s: float = DEADLINE_S) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.wait_exit(deadline_s)

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)


@dataclass
class Manager(Service):
    """A KV manager and its pool directory."""

    pool_dir: Path = Path()

    def stats(self) -> kv_manager_pb2.StatsResponse:
        """Block counts, as it tells them."""
        with grpc.insecure_channel(self.address) as channel:
            stub = kv_manager_pb2_grpc.KVManagerStub(channel)
            return stub.Stats(kv_manager_pb2.StatsRequest(), timeout=DEADLINE_S)

    def wait_all_free(self) -> None:
        """Returns when nobody holds a block and no lease is left; raises AssertionError otherwise. Cached blocks are free to take."""

        def all_free() -> bool:
            stats = self.stats()
            return stats.free + stats.cached == stats.num_blocks and stats.num_leases == 0

        until(all_free, "every block is free again")

    def worker_lock_is_free(self, worker_id: str) -> bool:
        """Whether the kernel says that no process holds the worker's lock file."""
        fd = os.open(self.pool_dir / "workers" / f"{worker_id}.lock", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


@dataclass
class Decoder(Service):
    """A decoder."""

    worker_id: str = ""
    hold_until: Path = Path()  # of one that holds still, see held_decoder.py

    def wait_held(self) -> None:
        """Returns when it holds still in the midst of its streams."""
        until(lambda: bool(self.events("held")), "the decoder holds still")

    def go_on(self) -> None:
        """Lets it compute again."""
        self.hold_until.touch()

    def stub(self, channel: grpc.aio.Channel) -> Any:
        """Its service, over a channel of the caller's."""
        return decoder_pb2_grpc.DecoderStub(channel)


class Processes:
    """Starts services, and kills at the end whatever still runs."""

    def __init__(self, directory: Path) -> None:
        """Logs and pools go under `directory`, which should lie on disk: /dev/shm is small in a container."""
        self._directory = directory
        self._services: list[Service] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in reversed(self._services):
            service.kill()

    def start_manager(
        self,
        *flags: str,
        listen: str = "127.0.0.1:0",
        pool_dir: Path | None = None,
        num_blocks: int | None = 256,  # None: as `flags` say
        wait: bool = True,
        module: str = "services.kv_manager",
    ) -> Manager:
        """A manager that serves; with wait=False it may still be starting. `listen` and `pool_dir` of an earlier one start it again."""
        pool_dir = self._directory / f"pool-{len(self._services)}" if pool_dir is None else pool_dir
        size = () if num_blocks is None else ("--num-blocks", str(num_blocks))
        argv = ("--listen", listen, "--pool-dir", str(pool_dir), *size, *flags)
        process, log_path = self._spawn(module, argv)
        manager = Manager(process, log_path, MANAGER_SERVICE, pool_dir=pool_dir)
        self._services.append(manager)
        if wait:
            manager.wait_serving()
        return manager

    def start_decoder(
        self,
        manager: Manager | str | None,
        *flags: str,
        model: Path = DEMO_MODEL,
        listen: str = "127.0.0.1:0",
        worker_id: str | None = None,
        backend: str = "mlx",
        wait: bool = True,
        hold_at: int | None = None,
    ) -> Decoder:
        """A decoder; without a manager it runs with --no-paged. With wait=False it may still be starting, or fail.

        With hold_at it holds still when it has made so many tokens, until `go_on` is called.
        """
        worker_id = worker_id or f"worker-{len(self._services)}"
        address = manager.address if isinstance(manager, Manager) else manager
        leases = ("--no-paged",) if address is None else ("--kv-manager", address)
        named = ("--model", str(model), "--listen", listen, "--worker-id", worker_id, "--backend", backend)
        module = "services.decoder"
        holds: tuple[str, ...] = ()
        hold_until = self._directory / f"go-on-{len(self._services)}"
        if hold_at is not None:
            module = "tests.e2e.held_decoder"
            holds = ("--hold-at", str(hold_at), "--hold-until", str(hold_until))
        process, log_path = self._spawn(module, (*named, *leases, *flags, *holds))
        decoder = Decoder(process, log_path, DECODER_SERVICE, worker_id=worker_id, hold_until=hold_until)
        self._services.append(decoder)
        if wait:
            decoder.wait_serving()
        return decoder

    def _spawn(self, module: str, flags: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
        self._directory.mkdir(parents=True, exist_ok=True)
        log_path = self._directory / f"{module}-{len(self._services)}.log"
        with log_path.open("wb") as log:
            # A session of its own: a Ctrl-C at the tests' terminal reaches it only through the tests.
            process = subprocess.Popen(
                [sys.executable, "-m", module, *flags],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, log_path
