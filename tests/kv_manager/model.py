"""The world of the model check: worker processes that follow the protocol, and a network that loses, doubles and reorders.

A process believes what the replies that reached it say, and acts on it: it reads and writes the blocks of its tables
whenever it likes, until it is dead. The manager may crash between any two stores.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from services.kv_manager.errors import ManagerError, PoolExhaustedError
from services.kv_manager.leasebook import SealOrder
from services.kv_manager.sessions import Lease, Session
from services.kv_manager.translate import registration
from tests.kv_manager.helpers import FakeClock, Manager, Worker

ROOT_HASH = bytes(32)


def hash_of(parent: bytes, symbol: int) -> bytes:
    """Content hash of a block that follows parent."""
    return hashlib.sha256(parent + bytes([symbol])).digest()


class Crash(BaseException):
    """The manager's process ends here; nothing that it does afterwards reaches the files."""


class CrashingMap:
    """A .meta mapping whose process dies before a chosen store."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.stores_left: int | None = None

    def __getitem__(self, key: Any) -> Any:
        return self.real[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.stores_left is not None:
            if self.stores_left <= 0:
                raise Crash
            self.stores_left -= 1
        self.real[key] = value

    def flush(self, *_: int) -> None:
        """The files are on tmpfs or survive the process anyway."""

    def close(self) -> None:
        self.real.close()


@dataclass
class Table:
    """A lease as its process believes it to be."""

    blocks: list[int]
    hashes: list[bytes]  # of the blocks at the front that are sealed, or that a Seal was sent for
    duplicates: set[int] = field(default_factory=set)
    must_give_way: bool = False


@dataclass
class Call:
    """A request under way: copies of it may arrive at any time, and its reply may."""

    process: Process
    kind: str
    epoch: int
    seq: int
    acked_seq: int
    arguments: tuple[Any, ...]

    @property
    def leased_id(self) -> int:
        """The cache id that an acquire or fork would create."""
        return int(self.arguments[0] if self.kind == "acquire" else self.arguments[1])


@dataclass(eq=False)
class Process:
    """One life of a worker."""

    worker: Worker
    is_alive: bool = True
    epoch: int | None = None
    tables: dict[int, Table] = field(default_factory=dict)
    next_seq: int = 1
    next_cache_id: int = 1
    outstanding: dict[int, Call] = field(default_factory=dict)
    registering: int = 0  # the attempt whose reply it waits for
    left_open: list[Call] = field(default_factory=list)  # what the session before did not answer, to be asked again

    def reading(self) -> set[int]:
        """Every block that it may read now."""
        return {block for table in self.tables.values() for block in [*table.blocks, *table.duplicates]}

    def writable(self) -> list[int]:
        """Every block that it may write now."""
        return [block for table in self.tables.values() for block in table.blocks[len(table.hashes) :]]

    def call(self, kind: str, *arguments: Any) -> Call:
        """Numbers a new call."""
        assert self.epoch is not None
        seq = self.next_seq
        self.next_seq += 1
        acked = min(self.outstanding, default=seq) - 1
        call = Call(self, kind, self.epoch, seq, acked, arguments)
        self.outstanding[seq] = call
        return call


class World:
    """Manager, processes and network."""

    def __init__(self, pool_dir: Path, num_blocks: int) -> None:
        self.clock = FakeClock()
        self.manager = Manager(pool_dir, self.clock, num_blocks=num_blocks, ttl_s=10.0, preempt_timeout_s=2.0)
        self.processes: dict[str, Process] = {}
        self.network: list[Call] = []
        # Every message of late; a copy of any of them may arrive at any time.
        self.sent: deque[Call] = deque(maxlen=80)
        self.replies: list[tuple[Call, Any]] = []
        # What each block's bytes are: the hash that they were sealed under, or something that was never sealed.
        self.data: dict[int, bytes] = {}
        self.num_crashes = 0
        self._map: CrashingMap | None = None

    # The manager's side.

    def arm(self, stores: int) -> None:
        """Lets the manager die after so many more stores."""
        if self._wrap() is not None and self._map is not None:
            self._map.stores_left = stores

    def _wrap(self) -> CrashingMap | None:
        pool = self.manager.lessor.pool
        if pool is None:
            return None
        meta = pool.files.meta
        if not isinstance(meta._map, CrashingMap):
            self._map = CrashingMap(meta._map)
            meta._map = self._map  # type: ignore[assignment]
        return self._map

    def guarded(self, action: Callable[[], None]) -> None:
        """Runs something in the manager, which may die in it and is started again then."""
        self._wrap()
        try:
            action()
        except Crash:
            self.num_crashes += 1
            self.restart()

    def restart(self) -> None:
        """Ends the manager and starts another on its files."""
        if self._map is not None:
            self._map.stores_left = None
        self.manager.crash_and_restart()
        self._wrap()

    def deliver(self, call: Call) -> None:
        """A copy of a request arrives; its reply goes out, now or when its wait is over."""
        self.guarded(partial(self._serve, call))

    def _serve(self, call: Call) -> None:
        lessor = self.manager.lessor
        try:
            if call.kind == "register":
                answer = lessor.register(call.arguments[0])
                assert not answer.lost_cache_ids, "a claim of a worker that follows the protocol was lost"
                self.replies.append((call, answer.session.epoch))
                return
            worker_id = call.process.worker.worker_id
            session = lessor.enter(worker_id, call.epoch, call.seq, call.acked_seq)
            if call.kind == "release":
                cache_ids, blocks = call.arguments
                if blocks and session.is_first_copy(call.seq):
                    lessor.book.release_duplicates(session, cache_ids[0], blocks)
                elif not blocks:
                    lessor.book.release(session, cache_ids, call.seq)
                lessor.waiting.pump()
                self.replies.append((call, None))
                return
            lessor.require_live(session)
            if call.kind == "seal":
                self._verify([call.arguments[0].content_hash])
                self.replies.append((call, lessor.book.seal(session, call.arguments[0])))
                return
            if call.kind == "acquire":
                self._verify(call.arguments[5])
            self._lease(call, partial(getattr(lessor.book, call.kind), session, *call.arguments))
        except ManagerError as error:
            self.replies.append((call, error))

    def _lease(self, call: Call, attempt: Callable[..., Lease]) -> None:
        lessor, worker_id = self.manager.lessor, call.process.worker.worker_id
        session = lessor.enter(worker_id, call.epoch, call.seq, call.acked_seq)

        def settle(outcome: Lease | ManagerError) -> None:
            is_lease = isinstance(outcome, Lease)
            # What is sent is a copy, as of now.
            reply = (list(outcome.blocks), outcome.num_cached_tokens) if isinstance(outcome, Lease) else outcome
            assert is_lease or isinstance(reply, ManagerError)
            self.replies.append((call, reply))

        try:
            settle(attempt())
        except PoolExhaustedError as error:
            if call.kind == "fork":
                raise
            lessor.waiting.wait(session, error, partial(attempt, is_first_waiter=True), settle, 5.0)

    def _verify(self, hashes: list[bytes]) -> None:
        """What the service does before a lookup, with this world's bytes."""
        pool = self.manager.lessor.pool
        assert pool is not None
        for block in self.manager.lessor.book.unverified(hashes):
            if self.data.get(block) == hashes[[pool.find(h) for h in hashes].index(block)]:
                pool.mark_verified(block)
            else:
                self.manager.lessor.discard_corrupt(block)

    # The processes' side.

    def start_process(self, worker_id: str) -> Process:
        """A new life of a worker; the one before it must be dead."""
        worker = Worker(self.manager.pool_dir, worker_id, secrets.token_bytes(16), 4, 6 * 16).lock()
        process = self.processes[worker_id] = Process(worker)
        return process

    def kill(self, process: Process) -> None:
        """The kernel drops the lock; messages that are under way stay so."""
        process.is_alive = False
        process.worker.die()

    def register(self, process: Process) -> None:
        """Sends a registration with all that it holds; from now on replies of its old epoch mean nothing to it."""
        process.epoch = None
        # Not the single blocks that it was giving back: it does not claim them, so the new session does not have them.
        process.left_open += [c for c in process.outstanding.values() if c.kind != "release" or not c.arguments[1]]
        process.outstanding.clear()
        for table in process.tables.values():
            table.duplicates.clear()
        claims = {cache_id: table.blocks for cache_id, table in process.tables.items()}
        pool = self.manager.lessor.pool
        request = process.worker.request(pool.files.pool_id if pool is not None else b"", claims)
        process.registering = process.worker.attempt
        self._post(Call(process, "register", 0, 0, 0, (registration(request), process.registering)))

    def receive(self, call: Call, reply: Any) -> None:
        """A reply reaches the process; whatever it no longer waits for, it drops."""
        process = call.process
        if not process.is_alive:
            return
        if call.kind == "register":
            if not isinstance(reply, ManagerError) and call.arguments[1] == process.registering:
                process.registering, process.epoch = 0, reply
                process.next_seq = 1
                left_open, process.left_open = process.left_open, []
                for left in left_open:
                    self.send(process, left.kind, *left.arguments)
            return
        if call.epoch != process.epoch or process.outstanding.get(call.seq) is not call:
            return
        del process.outstanding[call.seq]
        if isinstance(reply, ManagerError):
            if call.kind in ("acquire", "fork"):
                # A late copy of it may lease yet; released, it leases nothing.
                self.send(process, "release", [call.leased_id], [])
            return
        if call.kind in ("acquire", "fork"):
            self._adopt(process, call, *reply)
        elif call.kind == "extend" and call.arguments[0] in process.tables:
            table = process.tables[call.arguments[0]]
            # Only what lies beyond: the rest of the reply may be older than what the process knows.
            table.blocks += reply[0][len(table.blocks) :]
        elif call.kind == "seal" and call.arguments[0].cache_id in process.tables:
            order, table = call.arguments[0], process.tables[call.arguments[0].cache_id]
            if table.blocks[order.block_index] == order.block and reply != order.block:
                table.blocks[order.block_index] = reply
                table.duplicates.add(order.block)

    def _adopt(self, process: Process, call: Call, blocks: list[int], num_cached_tokens: int) -> None:
        cache_id = call.leased_id
        num_cached = num_cached_tokens // 16
        if call.kind == "acquire":
            hashes = list(call.arguments[5][:num_cached])
        else:
            parent = process.tables.get(call.arguments[0])
            if parent is None:
                # It gave the parent up meanwhile, and does not know what it would share.
                self.send(process, "release", [cache_id], [])
                return
            hashes = parent.hashes[:num_cached]
        process.tables[cache_id] = Table(blocks, hashes)

    def send(self, process: Process, kind: str, *arguments: Any) -> None:
        """Puts a new call on the network."""
        self._post(process.call(kind, *arguments))

    def _post(self, call: Call) -> None:
        self.network.append(call)
        self.sent.append(call)

    def give_up(self, process: Process, call: Call) -> None:
        """The process stops waiting for a call; what it may have leased by it, it gives back unseen.

        A Release it cannot ask for again under another number: by then, the same blocks may be duplicates once more, and read. It opens
        a new session, which has only what it claims.
        """
        if call.kind == "release":
            self.register(process)
            return
        del process.outstanding[call.seq]
        if call.kind in ("acquire", "fork"):
            self.send(process, "release", [call.leased_id], [])

    def give_way(self, process: Process, cache_id: int) -> None:
        """The manager revoked a lease. Its table may be under way still; when it comes, nobody waits for it any more."""
        process.tables.pop(cache_id, None)
        for call in list(process.outstanding.values()):
            if call.kind in ("acquire", "fork") and call.leased_id == cache_id:
                del process.outstanding[call.seq]
        self.send(process, "release", [cache_id], [])

    def seal_next(self, process: Process, cache_id: int, symbol: int) -> None:
        """Writes the first unsealed block of a table and asks to have it sealed; it is not written again."""
        table = process.tables[cache_id]
        index = len(table.hashes)
        parent = table.hashes[-1] if table.hashes else ROOT_HASH
        content_hash = hash_of(parent, symbol)
        table.hashes.append(content_hash)
        block = table.blocks[index]
        self.data[block] = content_hash
        self.send(process, "seal", SealOrder(cache_id, index, block, content_hash, parent, 16, 0))

    def reseal(self, process: Process, cache_id: int, index: int) -> None:
        """Asks again for a Seal whose reply it does not have, or has."""
        table = process.tables[cache_id]
        parent = table.hashes[index - 1] if index else ROOT_HASH
        order = SealOrder(cache_id, index, table.blocks[index], table.hashes[index], parent, 16, 0)
        self.send(process, "seal", order)

    # What must hold.

    def _check_leaks(self, process: Process, session: Session | None) -> None:
        """Every lease is one that the process has, or is still to have or to give back."""
        if session is None or session.epoch != process.epoch:
            return
        pending = set(process.tables)
        for call in process.outstanding.values():
            if call.kind == "release":
                pending.update(call.arguments[0])
            elif call.kind in ("acquire", "fork"):
                pending.add(call.leased_id)
        assert set(session.leases) <= pending, f"leases {set(session.leases) - pending} are known to nobody"

    def check(self) -> None:
        """The safety rule itself, and the manager's own proof."""
        self.manager.check()
        pool = self.manager.lessor.pool
        if pool is None:
            return
        living = [process for process in self.processes.values() if process.is_alive]
        sessions = {session.worker.worker_id: session for session in self.manager.lessor.sessions()}
        for process in living:
            writable = process.writable()
            assert len(set(writable)) == len(writable), "a process may write a block through two tables"
            for other in living:
                shared = set(writable) & other.reading() if other is not process else set()
                assert not shared, f"blocks {shared} are writable by {process.worker.worker_id} and held by another"
            for block in process.reading():
                session = sessions.get(process.worker.worker_id)
                assert session is not None, f"a living process holds block {block} and has no session"
                assert pool.is_held_by(block, session.slot), f"block {block} was taken from a living process"
            self._check_leaks(process, sessions.get(process.worker.worker_id))
        for block in pool.sealed_blocks():
            content = pool.content(block)
            assert content is not None
            assert self.data.get(block) == content.content_hash, f"block {block} was written after it was sealed"
