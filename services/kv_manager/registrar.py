"""Opens, re-opens and ends sessions: everything that depends on the proof that a worker lives or is dead."""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path

import structlog

from services.kv_manager import locks
from services.kv_manager.block_pool import BlockPool
from services.kv_manager.config import Config
from services.kv_manager.cuda_pool import pid_namespace
from services.kv_manager.errors import (
    LockProofError,
    PredecessorLivesError,
    StaleRegistrationError,
    TooManyWorkersError,
)
from services.kv_manager.events import EventRing
from services.kv_manager.locks import LockProbe
from services.kv_manager.meta_format import NUM_SLOTS, WorkerRecord
from services.kv_manager.pool_file import PoolFiles, create_pool, find_pool
from services.kv_manager.pool_memory import HOST, PoolMemory
from services.kv_manager.pool_size import num_blocks_for, require_flags_fit
from services.kv_manager.recovery import Recovered
from services.kv_manager.registration import Claim, Registered, Registration, check_claims
from services.kv_manager.sessions import ABSENT, LIVE, ORPHANED, REVOKED, Clock, Lease, Session

_log = structlog.get_logger("kv_manager.registrar")
_MAX_RETIRED = 4096


class _Before(Enum):
    """What a registration shows of the process that had the worker's session before."""

    NOBODY = auto()
    ITSELF = auto()
    DEAD = auto()
    UNKNOWN = auto()  # and never to be known: there is nothing to look at


class Registrar:
    """The pool and the sessions on it. Single-threaded, like all of the manager's state."""

    def __init__(self, config: Config, pool_dir: Path, clock: Clock, memory: PoolMemory = HOST) -> None:
        """Recovers what lies in pool_dir, which the caller has locked; raises PoolFileError when that cannot serve."""
        self.memory = memory
        self.num_pools_lost = 0
        self.config = config
        self.pool_dir = pool_dir
        self.clock = clock
        self.sessions: dict[str, Session] = {}
        self.pool: BlockPool | None = None
        self.events = EventRing()
        self.manager_epoch = 1
        self._last_epoch = 0  # of a pool that was lost: no epoch is issued twice
        self._kernel_boot_id = locks.kernel_boot_id()
        # Boot ids that were replaced or died: a registration of theirs can only be a late copy, or of one that has lost its name.
        self._retired: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        files, removed = find_pool(pool_dir, memory.storage)
        if removed:
            _log.warning("removed files of pools that were not whole", pool_dir=str(pool_dir), files=removed)
        if files is not None:
            require_flags_fit(config, files)
            self._recover(files)
            self.drop_lost_pool()

    def _recover(self, files: PoolFiles) -> None:
        rebooted = self._is_other_boot(files.meta.kernel_boot_id)
        recovered = Recovered(files, self.events)
        self.pool = recovered.pool
        # The latest first: of two with one name, the earlier was set aside.
        for slot, worker in sorted(recovered.workers.items(), key=lambda entry: -(entry[1].epoch if entry[1] else 0)):
            held = recovered.held.get(slot, [])
            record = worker or _unknown_worker(slot)
            probe = self._find_lock(record) if worker else None
            is_dead = rebooted if worker is None else self._is_other_boot(worker.kernel_boot_id)
            session = Session(record, slot, probe, ABSENT, self.clock(), pinned=held)
            if record.worker_id in self.sessions:
                _rename_orphan(session)
            self.sessions[session.worker.worker_id] = session
            self.pool.set_revoked(slot, True, held)
            if is_dead or (probe is not None and not probe.is_held()):
                self.end(session, "dead since before the start")
        # Last: a start cut short before here sees the reboot again.
        self.manager_epoch = files.meta.advance_epoch(self._kernel_boot_id)
        counts = {state.name.lower(): count for state, count in recovered.pool.counts().items()}
        _log.info("recovered", pool=files.pool_id.hex(), damaged_headers=recovered.num_damaged, **counts)

    def _is_other_boot(self, boot_id: str) -> bool:
        return bool(boot_id and self._kernel_boot_id and boot_id != self._kernel_boot_id)

    def _find_lock(self, worker: WorkerRecord) -> LockProbe | None:
        """The worker's lock as it was when it registered; None when the file is missing or is another: unknown."""
        try:
            probe = self.memory.probe(self.pool_dir, worker)
        except LockProofError:
            return None
        if probe.identity != (worker.lock_device, worker.lock_inode):
            probe.close()
            return None
        return probe

    def register(self, request: Registration) -> Registered:
        """Opens a session, or re-opens the worker's own with what it claims; raises and changes nothing on any doubt."""
        worker = request.worker
        if self.pool is not None:
            self.pool.files.geometry.require_same(request.geometry)
        old = self.sessions.get(worker.worker_id)
        self._require_fresh(worker, old)
        probe = self._open_held_lock(worker)
        try:
            before = self._require_successor(worker, old, probe)
            pool = self.pool or self._create_pool(request)
            claims_accepted = request.mapped_pool_id == pool.files.pool_id
            claims = request.claims if claims_accepted else ()
            check_claims(claims, pool.num_blocks)
            slot = self._free_slot() if old is None or before is _Before.UNKNOWN else old.slot
        except BaseException:
            probe.close()
            raise
        self.pool = pool
        if old is not None and before is _Before.DEAD:
            self.end(old, "replaced by a new process")
        elif old is not None and before is _Before.UNKNOWN:
            self._set_aside(old)
        if not self._kernel_boot_id or worker.kernel_boot_id != self._kernel_boot_id:
            worker = replace(worker, kernel_boot_id="")  # another kernel's reboots prove nothing here
        worker = replace(
            worker, pid_namespace=pid_namespace(), epoch=pool.files.meta.advance_epoch(self._kernel_boot_id)
        )
        capacity_blocks = -(-worker.kv_capacity_tokens // self.config.block_size)
        session = Session(worker, slot, probe, LIVE, self.clock(), min(capacity_blocks, pool.num_blocks))
        session.maps_pool = claims_accepted
        lost = self._reclaim(session, old if before is _Before.ITSELF else None, claims)
        _log.info("registered", worker=worker.worker_id, epoch=worker.epoch, leases=len(session.leases), lost=lost)
        return Registered(session, claims_accepted, lost)

    def _require_fresh(self, worker: WorkerRecord, old: Session | None) -> None:
        is_repeat = old is not None and old.worker.boot_id == worker.boot_id
        if (worker.worker_id, worker.boot_id) in self._retired:
            raise StaleRegistrationError(f"worker {worker.worker_id}: this boot_id belongs to a process that is dead")
        if is_repeat and old is not None and worker.attempt <= old.worker.attempt and old.worker.attempt:
            raise StaleRegistrationError(
                f"attempt {worker.attempt} is not above {old.worker.attempt}: a late copy of an earlier registration",
                {"attempt": str(worker.attempt), "last_attempt": str(old.worker.attempt)},
            )

    def _open_held_lock(self, worker: WorkerRecord) -> LockProbe:
        probe = self.memory.probe(self.pool_dir, worker)
        stated = (worker.lock_device, worker.lock_inode)
        problem = None
        if probe.identity != stated:
            problem = (
                f"is device and inode {probe.identity}, and the worker states {stated}: the file was replaced, or the worker"
                " sees another directory; restart the worker, with the manager's --pool-dir mounted"
            )
        elif not probe.is_locked():
            problem = "is not locked: the worker must hold an exclusive flock on it for its whole life"
        if problem is None and probe.holder() in ("", worker.boot_id.hex()):
            return probe
        probe.close()
        if problem is None:
            # Found by the model check: this manager may not know of the process that the sender was replaced by.
            raise StaleRegistrationError(
                f"worker {worker.worker_id}: another boot_id stands in its lock file, so this is a late copy of a dead"
                " process's registration"
            )
        raise LockProofError(f"the lock file {probe.path} {problem}", {"lock_path": str(probe.path)})

    def _require_successor(self, worker: WorkerRecord, old: Session | None, probe: LockProbe) -> _Before:
        """Whose session it was; raises when this process may not have it, or only after the one before has ended."""
        if old is None:
            return _Before.NOBODY
        is_same_life = old.worker.boot_id == worker.boot_id
        is_same_lock = (old.worker.lock_device, old.worker.lock_inode) == (worker.lock_device, worker.lock_inode)
        # Where somebody deleted the lock file, the process takes another. Only it knows its boot_id, and who holds a lock has
        # written the one in the file: the new lock is as good a proof as the old one.
        if is_same_life and (is_same_lock or probe.holder() == worker.boot_id.hex()):
            return _Before.ITSELF
        if not is_same_life and old.probe is not None and not old.probe.is_held():
            return _Before.DEAD
        # On a GPU the lock is no proof by itself: without a probe of the process it stays unknown.
        if not is_same_life and is_same_lock and (old.probe is not None or self.memory.name == "host"):
            if old.probe is None or old.probe.allows_successor():
                return _Before.DEAD
            raise PredecessorLivesError(
                f"worker {worker.worker_id}: the process {old.worker.pid} that had this name is not gone yet, and what it runs on the"
                " GPU may still write its blocks; register again"
            )
        if not is_same_life and old.probe is None:
            return _Before.UNKNOWN
        path = self.pool_dir / locks.WORKERS_DIR / f"{worker.worker_id}.lock"
        metadata = {
            "lock_path": str(path),
            "stored_inode": str(old.worker.lock_inode),
            "stated_inode": str(worker.lock_inode),
        }
        if is_same_life:
            raise LockProofError(
                f"the lock file {path} of worker {worker.worker_id} was deleted or replaced while the worker ran (inode"
                f" {old.worker.lock_inode}, now {worker.lock_inode}), and the new one does not hold the worker's boot_id: whoever"
                " locks it must write that into it. Restart this worker; streams go on after it, and its blocks stay set"
                " aside where nothing proves that this process has ended",
                metadata,
            )
        raise LockProofError(
            f"worker {worker.worker_id} registered before with another lock file (inode {old.worker.lock_inode}, now"
            f" {worker.lock_inode} at {path}), and that process (pid {old.worker.pid}) is not proved dead: it may still"
            " write its blocks. Lock files must never be deleted. End that process if it runs, or start this one with"
            " another --worker-id; the blocks come back with proof, at the latest when the host reboots",
            metadata,
        )

    def _set_aside(self, session: Session) -> None:
        """Gives a worker's name to another process, though its own may live: see ORPHANED. It frees nothing."""
        worker = session.worker
        del self.sessions[worker.worker_id]
        # The process that has the name holds its lock, so the other one can only have registered with it before.
        self._retire(worker)
        _rename_orphan(session)
        self.sessions[session.worker.worker_id] = session
        _log.warning(
            "a worker's lock file was deleted: its blocks are quarantined until the host reboots",
            worker=worker.worker_id,
            blocks=len(set(session.references())),
            pid=worker.pid,
            session=session.worker.worker_id,
        )

    def _retire(self, worker: WorkerRecord) -> None:
        self._retired[worker.worker_id, worker.boot_id] = None
        if len(self._retired) > _MAX_RETIRED:
            self._retired.popitem(last=False)

    def _create_pool(self, request: Registration) -> BlockPool:
        config = self.config
        stride = request.geometry.shape(config.block_size).stride_bytes
        num_blocks = num_blocks_for(config, request.worker, stride)
        files = create_pool(self.pool_dir, request.geometry, config.block_size, num_blocks, self.memory.storage)
        files.meta.epoch = self._last_epoch
        # Issued now, so that the first session's epoch differs from the manager's own.
        self.manager_epoch = files.meta.advance_epoch(self._kernel_boot_id)
        size = {"num_blocks": num_blocks, "block_bytes": stride}
        _log.info("pool created", pool=files.pool_id.hex(), memory=self.memory.name, **size)
        pool = BlockPool(files, self.events)
        gc.freeze()  # or the collector walks a list entry for every block, again and again, while calls wait
        return pool

    def _free_slot(self) -> int:
        used = {session.slot for session in self.sessions.values()}
        for slot in range(NUM_SLOTS):
            if slot not in used:
                return slot
        raise TooManyWorkersError(
            f"all {NUM_SLOTS} worker slots are taken; stop workers, or use a second manager",
            {"num_slots": str(NUM_SLOTS)},
        )

    def _reclaim(self, session: Session, old: Session | None, claims: Sequence[Claim]) -> list[int]:
        """Makes the session the worker's, with the claims that hold; frees the rest of the old one. Answers the lost."""
        pool, slot = self._require_pool(), session.slot
        before = old.references() if old is not None else []
        lost: list[int] = []
        unsealed: set[int] = set()
        for claim in claims:
            mine = [block for block in claim.blocks if not pool.is_shared(block)]
            if not unsealed.isdisjoint(mine) or not all(pool.is_held_by(block, slot) for block in claim.blocks):
                lost.append(claim.cache_id)
                continue
            unsealed.update(mine)
            # A revocation is state: it outlives the session, until Release answers.
            known = old.leases.get(claim.cache_id) if old is not None else None
            session.leases[claim.cache_id] = Lease(
                claim.cache_id,
                list(claim.blocks),
                claim.priority,
                claim.tenant,
                claim.age_ticket or (known.age_ticket if known is not None else 0),
                revoked=known is not None and known.revoked,
            )
        after = session.references()
        pool.files.meta.write_slot(slot, session.worker)
        pool.open_slot(slot, session.epoch)
        pool.set_revoked(slot, False, before)
        for block in (Counter(after) - Counter(before)).elements():
            pool.share(slot, block)
        pool.drop(slot, list((Counter(before) - Counter(after)).elements()))
        self.sessions[session.worker.worker_id] = session
        if old is not None and old.probe is not None and session.probe is not None:
            session.probe.take_over(old.probe)
            old.probe.close()
        return lost

    def revoke(self, session: Session, why: str) -> None:
        """Sets a session's blocks aside; none of them is freed."""
        session.state = REVOKED
        self._require_pool().set_revoked(session.slot, True, session.references())
        _log.warning("revoked", worker=session.worker.worker_id, epoch=session.epoch, why=why)

    def restore(self, session: Session) -> None:
        """A revoked session that holds nothing any more and speaks again is live."""
        session.state = LIVE
        self._require_pool().set_revoked(session.slot, False, session.references())

    def end(self, session: Session, why: str) -> None:
        """Frees everything of a session whose process is proved dead."""
        pool = self._require_pool()
        references = session.references()
        num_freed = pool.drop(session.slot, references)
        pool.set_revoked(session.slot, False, ())
        pool.files.meta.clear_slot(session.slot)
        if session.probe is not None:
            session.probe.close()
        worker = session.worker
        self.sessions.pop(worker.worker_id, None)
        self._retire(worker)
        _log.info("session ended", worker=worker.worker_id, epoch=worker.epoch, why=why, freed_blocks=num_freed)

    def drop_lost_pool(self) -> None:
        """Forgets a pool in GPU memory that no living worker can bring back: the next registration makes another."""
        pool = self.pool
        if pool is None or not pool.files.data.is_absent:
            return
        for session in self.sessions.values():
            # One without a probe cannot register again: see _require_successor.
            if session.maps_pool or (session.state == ABSENT and session.probe is not None):
                return
        counts = {state.name.lower(): count for state, count in pool.counts().items()}
        event = "the GPU cache is gone: no worker that had its memory lives; the next registration makes a new pool"
        _log.warning(event, pool=pool.files.pool_id.hex(), **counts)
        self.num_pools_lost += 1
        self._last_epoch = pool.files.meta.epoch
        # Those without the memory hold nothing; they learn by the epoch that they must register again.
        for session in self.sessions.values():
            if session.probe is not None:
                session.probe.close()
        self.sessions.clear()
        self.pool = None
        self.events.restart()
        pool.files.delete()

    def _require_pool(self) -> BlockPool:
        assert self.pool is not None, "there are no sessions without a pool"
        return self.pool


def _unknown_worker(slot: int) -> WorkerRecord:
    return WorkerRecord(f"?slot {slot}", b"", 0, 0, 0, 0, "", 0, 0, 0, 0)


def _rename_orphan(session: Session) -> None:
    # No worker can have this name. The slot in the file keeps the worker's own, with its lock.
    session.worker = replace(session.worker, worker_id=f"{session.worker.worker_id}?{session.slot}")
    session.state = ORPHANED
