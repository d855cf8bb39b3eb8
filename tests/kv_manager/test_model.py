"""The safety rule, model-checked: hypothesis drives a manager and its workers through lost, doubled and reordered
messages, deaths, silences, manager crashes between any two stores, and full pools."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.kv_manager.model import ROOT_HASH, Call, Process, World, hash_of

_WORKERS = ("w0", "w1", "w2")
_pick = st.integers(0, 1 << 16)


def _seldom(pick: int) -> bool:
    """Whether an event that undoes much takes place: if it did always, no history would ever be long."""
    return pick // 7 % 4 == 0


class SafetyMachine(RuleBasedStateMachine):
    """Every rule is one event of the world; the invariant is the safety rule."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.mkdtemp(dir="/dev/shm", prefix="leasehold-model-")
        self.world = World(Path(self._directory) / "pool", num_blocks=8)

    @initialize()
    def start(self) -> None:
        for worker_id in _WORKERS[:2]:
            self._register_now(self.world.start_process(worker_id))

    def _register_now(self, process: Process) -> None:
        self.world.register(process)
        self.world.deliver(self.world.network.pop())
        if self.world.replies:
            self.world.receive(*self.world.replies.pop())

    def _process(self, pick: int) -> Process | None:
        """A living process with a session, if there is one."""
        able = [process for process in self.world.processes.values() if process.is_alive and process.epoch is not None]
        return able[pick % len(able)] if able else None

    def _table(self, pick: int, with_duplicates: bool = False) -> tuple[Process, int] | None:
        able = [
            (process, cache_id)
            for process in self.world.processes.values()
            if process.is_alive and process.epoch is not None
            for cache_id, table in process.tables.items()
            if table.duplicates or not with_duplicates
        ]
        return able[pick % len(able)] if able else None

    def _hurry(self, pick: int) -> None:
        """Two times in three, has the newest message and its reply arrive at once, as most do."""
        if pick % 3 == 0:
            return
        call = self.world.network.pop()
        self.world.deliver(call)
        for answered in [reply for reply in self.world.replies if reply[0] is call]:
            self.world.replies.remove(answered)
            self.world.receive(*answered)

    # What processes do.

    @rule(
        pick=_pick,
        num_blocks=st.integers(1, 4),
        priority=st.integers(0, 1),
        symbols=st.lists(st.integers(0, 1), max_size=3),
    )
    def acquire(self, pick: int, num_blocks: int, priority: int, symbols: list[int]) -> None:
        process = self._process(pick)
        if process is None:
            return
        hashes, parent = [], ROOT_HASH
        for symbol in symbols:
            parent = hash_of(parent, symbol)
            hashes.append(parent)
        cache_id = process.next_cache_id
        process.next_cache_id += 1
        self.world.send(process, "acquire", cache_id, num_blocks, priority, "", None, hashes)
        self._hurry(pick)

    @rule(pick=_pick, more=st.integers(1, 3))
    def extend(self, pick: int, more: int) -> None:
        found = self._table(pick)
        if found is not None:
            process, cache_id = found
            self.world.send(process, "extend", cache_id, len(process.tables[cache_id].blocks) + more)
            self._hurry(pick)

    @rule(pick=_pick, num_blocks=st.integers(1, 4))
    def fork(self, pick: int, num_blocks: int) -> None:
        found = self._table(pick)
        if found is not None:
            process, cache_id = found
            fork_id = process.next_cache_id
            process.next_cache_id += 1
            self.world.send(process, "fork", cache_id, fork_id, num_blocks, len(process.tables[cache_id].hashes))
            self._hurry(pick)

    @rule(pick=_pick)
    def release(self, pick: int) -> None:
        found = self._table(pick)
        if found is not None:
            process, cache_id = found
            del process.tables[cache_id]
            self.world.send(process, "release", [cache_id], [])
            self._hurry(pick)
            if pick % 2:  # what made the lease arrives once more, and the Release has overtaken it
                for call in [call for call in self.world.sent if call.process is process]:
                    if call.kind in ("acquire", "fork") and call.leased_id == cache_id:
                        self.world.deliver(call)

    @rule(pick=_pick, symbol=st.integers(0, 1))
    def seal(self, pick: int, symbol: int) -> None:
        found = self._table(pick)
        if found is not None:
            process, cache_id = found
            table = process.tables[cache_id]
            if len(table.hashes) < len(table.blocks):
                self.world.seal_next(process, cache_id, symbol)
                self._hurry(pick)

    @rule(pick=_pick, which=_pick)
    def seal_again(self, pick: int, which: int) -> None:
        found = self._table(pick)
        if found is not None and found[0].tables[found[1]].hashes:
            process, cache_id = found
            self.world.reseal(process, cache_id, which % len(process.tables[cache_id].hashes))
            self._hurry(pick)

    @rule(pick=_pick)
    def release_duplicates(self, pick: int) -> None:
        found = self._table(pick)
        if found is not None and found[0].tables[found[1]].duplicates:
            process, cache_id = found
            blocks = list(process.tables[cache_id].duplicates)
            process.tables[cache_id].duplicates.clear()
            self.world.send(process, "release", [cache_id], blocks)
            self._hurry(pick)

    @rule(pick=_pick, symbol=st.integers(0, 1), num_blocks=st.integers(1, 3))
    def follow_another(self, pick: int, symbol: int, num_blocks: int) -> None:
        """The next blocks of a table take the content that another has sealed, where there is one, and are duplicates."""
        found = (self._table(pick, with_duplicates=True) if pick % 4 else None) or self._table(pick)
        for _ in range(num_blocks if found is not None else 0):
            assert found is not None
            if found[0].epoch is None or found[1] not in found[0].tables:
                return
            self._follow_one_block(*found, pick, symbol)

    def _follow_one_block(self, process: Process, cache_id: int, pick: int, symbol: int) -> None:
        """Gives duplicates back first, so that one of their blocks may be the next duplicate of the same table.

        The answer to that is late: until it is there, a copy of the call is none of the past, and one may arrive when the block is back.
        """
        table = process.tables[cache_id]
        released: Call | None = None
        if table.duplicates:
            blocks = list(table.duplicates)
            table.duplicates.clear()
            self.world.send(process, "release", [cache_id], blocks)
            released = self.world.network.pop()
            self.world.deliver(released)
        if len(table.hashes) == len(table.blocks):
            self.world.send(process, "extend", cache_id, len(table.blocks) + 1)
            self._hurry(1)
        pool = self.world.manager.lessor.pool
        if pool is not None and len(table.hashes) < len(table.blocks):
            parent = table.hashes[-1] if table.hashes else ROOT_HASH
            known = [each for each in (0, 1) if pool.find(hash_of(parent, each)) is not None]
            self.world.seal_next(process, cache_id, known[0] if known else symbol)
            self._hurry(1)
        if released is not None and pick % 2:
            self.world.deliver(released)

    @rule(pick=_pick)
    def write(self, pick: int) -> None:
        living = [process for process in self.world.processes.values() if process.is_alive and process.writable()]
        if living:
            process = living[pick % len(living)]
            blocks = process.writable()
            self.world.data[blocks[pick % len(blocks)]] = b"never sealed"

    @rule(pick=_pick)
    def give_up_a_call(self, pick: int) -> None:
        process = self._process(pick)
        if process is not None and process.outstanding:
            calls = list(process.outstanding.values())
            self.world.give_up(process, calls[pick % len(calls)])

    @rule(pick=_pick)
    def register_again(self, pick: int) -> None:
        living = [process for process in self.world.processes.values() if process.is_alive]
        if living and _seldom(pick):
            self.world.register(living[pick % len(living)])

    @rule(pick=_pick)
    def keepalive(self, pick: int) -> None:
        process = self._process(pick)
        if process is None or process.epoch is None:
            return
        lessor = self.world.manager.lessor
        sessions = {session.worker.worker_id: session for session in lessor.sessions()}
        session = sessions.get(process.worker.worker_id)
        if session is None or session.epoch != process.epoch or session.state == "absent":
            self.world.register(process)
            return
        lessor.keepalive(process.worker.worker_id, process.epoch, None)
        for cache_id in lessor.revoked_cache_ids(session):
            self.world.give_way(process, cache_id)

    @rule(pick=_pick)
    def die(self, pick: int) -> None:
        living = [process for process in self.world.processes.values() if process.is_alive]
        if living and _seldom(pick):
            self.world.kill(living[pick % len(living)])

    @rule(worker_id=st.sampled_from(_WORKERS), at_once=st.booleans())
    def start_anew(self, worker_id: str, at_once: bool) -> None:
        process = self.world.processes.get(worker_id)
        if process is None or not process.is_alive:
            process = self.world.start_process(worker_id)
            if at_once:
                self._register_now(process)
            else:
                self.world.register(process)

    # What the network does.

    def _message(self, pick: int) -> Call | None:
        return self.world.network[pick % len(self.world.network)] if self.world.network else None

    @rule(pick=_pick)
    def deliver(self, pick: int) -> None:
        call = self._message(pick)
        if call is not None:
            self.world.network.remove(call)
            self.world.deliver(call)

    @rule(pick=_pick)
    def deliver_a_late_copy(self, pick: int) -> None:
        if self.world.sent:
            back = 1 + pick % min(10, len(self.world.sent))
            self.world.deliver(self.world.sent[-back])

    @rule(pick=_pick)
    def deliver_a_copy_of_what_is_answered(self, pick: int) -> None:
        """A copy that only the manager's own memory tells from a new call: its sequence number is not acknowledged yet."""
        acknowledged = {
            session.worker.worker_id: (session.epoch, session.acked_seq)
            for session in self.world.manager.lessor.sessions()
        }
        kinds = (("acquire", True), ("fork", True), ("release", True), ("release", False))
        kind, is_whole = kinds[pick % 4]
        copies = [
            call
            for call in self.world.sent
            if call.kind == kind
            and (kind != "release" or not call.arguments[1]) == is_whole
            and call not in self.world.network
            and (call.epoch, call.seq) > acknowledged.get(call.process.worker.worker_id, (call.epoch + 1, 0))
        ]
        if copies:
            self.world.deliver(copies[pick // 4 % len(copies)])

    @rule()
    def deliver_in_order(self) -> None:
        while self.world.network:
            self.world.deliver(self.world.network.pop(0))
        while self.world.replies:
            self.world.receive(*self.world.replies.pop(0))

    @rule(pick=_pick)
    def lose(self, pick: int) -> None:
        call = self._message(pick)
        if call is not None:
            self.world.network.remove(call)

    @rule(pick=_pick, is_lost=st.booleans())
    def reply(self, pick: int, is_lost: bool) -> None:
        if self.world.replies:
            call, answer = self.world.replies.pop(pick % len(self.world.replies))
            if not is_lost:
                self.world.receive(call, answer)

    # What happens to the manager.

    @rule(seconds=st.sampled_from([0.5, 0.5, 0.5, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        steps = int(seconds / 0.5)
        for _ in range(steps):
            self.world.clock.advance(0.5)
            self.world.guarded(lambda: self.world.manager.lessor.tick())

    @rule(pick=_pick)
    def restart(self, pick: int) -> None:
        if _seldom(pick):
            self.world.restart()

    @rule(pick=_pick, stores=st.integers(0, 6))
    def crash_soon(self, pick: int, stores: int) -> None:
        if _seldom(pick):
            self.world.arm(stores)

    @rule(pick=_pick)
    def flush(self, pick: int) -> None:
        pool = self.world.manager.lessor.pool
        if pool is not None and _seldom(pick):
            self.world.guarded(lambda: [pool.discard(block) for block in pool.cached_blocks()] and None)

    @invariant()
    def nothing_is_taken_from_the_living(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """In the end every block is accounted for, and none is lost."""
        try:
            world = self.world
            if world._map is not None:
                world._map.stores_left = None
            world.restart()
            for process in world.processes.values():
                if process.is_alive:
                    self._register_now(process)
            world.check()
            for process in world.processes.values():
                world.kill(process)
            for _ in range(30):
                world.clock.advance(0.5)
                world.manager.lessor.tick()
            world.check()
            counts = world.manager.lessor.counts()
            assert sum(counts.values()) in (0, 8)
            held = {state.name: count for state, count in counts.items() if state.name not in ("FREE", "CACHED")}
            assert not any(held.values()), f"everybody is dead, and blocks are held: {held}"
        finally:
            self.world.manager.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            gc.unfreeze()  # each manager froze what there was; nothing of hundreds of worlds would ever be freed


structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
TestSafety = SafetyMachine.TestCase
TestSafety.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


class LateCopiesMachine(SafetyMachine):
    """The same where nobody dies and time stands still: histories get to what only memory of past calls keeps right."""

    die = start_anew = register_again = None  # type: ignore[assignment]
    restart = crash_soon = flush = time_passes = None  # type: ignore[assignment]
    give_up_a_call = keepalive = lose = write = None  # type: ignore[assignment]


TestLateCopies = LateCopiesMachine.TestCase
TestLateCopies.settings = settings(TestSafety.settings, max_examples=400)


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestSafetyLong(SafetyMachine.TestCase):
    """The same for much longer."""

    settings = settings(TestSafety.settings, max_examples=600, stateful_step_count=100)
