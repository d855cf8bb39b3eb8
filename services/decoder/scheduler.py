"""Who runs in the next step, and the leases that go with it. Touched by the engine's thread only, between steps."""

from __future__ import annotations

from bisect import insort
from itertools import count

import structlog

from services.decoder.block_hash import BlockHasher
from services.decoder.engine_settings import EngineSettings
from services.decoder.errors import DecoderError, EngineFailedError, PoolExhaustedError
from services.decoder.leases import (
    AcquireAsk,
    BlockSealed,
    ExtendAsk,
    ForkAsk,
    HeldLease,
    LeaseGranted,
    LeasePort,
    LeaseRefused,
    SealAsk,
    SealRefused,
)
from services.decoder.sequence import Chunk, Sequence, SequenceState, blocks_for

_log = structlog.get_logger(__name__)


class LeaseError(Exception):
    """A sequence cannot go on for want of its lease."""

    def __init__(self, sequence: Sequence, error: DecoderError) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


class Scheduler:
    """Gives seats to waiting sequences by priority and age, asks for their leases in time, and plans the steps.

    A method that ends a sequence for want of blocks says so by raising the error that its request fails with.
    """

    def __init__(self, settings: EngineSettings, port: LeasePort) -> None:
        self._settings = settings
        self._port = port
        self._cache_ids = count(1)
        self._block_size: int | None = None
        self._hasher: BlockHasher | None = None  # where blocks can be sealed
        self._waiting: list[Sequence] = []  # sorted by order
        self._seated: dict[int, Sequence] = {}  # by cache id, acquiring or running
        self.num_preempted = 0
        self.num_held_back = 0  # times that a step left a sequence out because of its seals
        # Whether there is a session in which seals are answered: nobody waits for them while the manager is away.
        self.answers_seals = False

    @property
    def block_size(self) -> int:
        """Tokens in a block; raises ValueError before there is a pool."""
        if self._block_size is None:
            raise ValueError("there is no pool yet")
        return self._block_size

    def set_pool(self, block_size: int, hasher: BlockHasher | None = None) -> None:
        """A pool is mapped for the first time, or anew: leases of before are void, and their sequences start over."""
        # An Acquire that is still open would lease blocks of the new pool for nobody, so everything is released.
        for cache_id in list(self._seated):
            self.preempt(cache_id)
        for sequence in self._waiting:
            for owner in (sequence, *sequence.followers):
                owner.forget_hashes()
        self._block_size = block_size
        self._hasher = hasher
        self.answers_seals = True

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence and gives its lease back; its followers go on without it."""
        self._give_up_seat(sequence)
        sequence.state = SequenceState.ENDED
        self._free_followers(sequence)

    def preempt(self, cache_id: int) -> None:
        """Gives a revoked lease back and queues its sequence again, with its age; a lease of before is ignored."""
        sequence = self._seated.get(cache_id)
        if sequence is None:
            return
        self.num_preempted += 1
        _log.info("preempted", **sequence.log_ids, num_tokens=len(sequence.token_ids))
        self._give_up_seat(sequence)
        sequence.unseat()
        self.add(sequence)

    def granted(self, answer: LeaseGranted) -> tuple[Sequence, bool] | None:
        """Takes a table in; the sequence and whether it is admitted by it for the first time, or None for a lease of before.

        Raises LeaseError when the answer cannot be served.
        """
        sequence = self._seated.get(answer.cache_id)
        if sequence is None:
            return None
        num_blocks, num_cached = len(answer.block_ids), answer.num_cached_tokens
        if num_blocks < max(sequence.num_blocks_asked, len(sequence.block_ids)):
            raise LeaseError(sequence, EngineFailedError(f"the lease has only {num_blocks} blocks"))
        if sequence.state is SequenceState.RUNNING:
            sequence.grow(answer.block_ids)
            return sequence, False
        if num_cached >= len(sequence.token_ids) or num_cached % self.block_size:
            raise LeaseError(sequence, EngineFailedError(f"the lease has {num_cached} cached tokens"))
        sequence.take_blocks(answer.block_ids)
        sequence.num_seals_asked = sequence.num_sealed = num_cached // self.block_size
        is_first = sequence.start(num_cached, answer.age_ticket)
        self._note_prompt(sequence)
        if not is_first:
            _log.info("resumed", **sequence.log_ids, num_cached_tokens=num_cached)
        return sequence, is_first

    def refused(self, answer: LeaseRefused) -> None:
        """Takes a refusal in; raises LeaseError when the sequence cannot go on without those blocks."""
        sequence = self._seated.get(answer.cache_id)
        if sequence is None:
            return
        sequence.num_blocks_asked = 0
        if sequence.state is not SequenceState.RUNNING:
            del self._seated[answer.cache_id]  # nothing was leased, so nothing is to be released
            if sequence.is_forking:
                # An Acquire shares the same blocks by their hashes, and can wait for the others.
                sequence.unseat()
                sequence.is_fork_refused = True
                self.add(sequence)
                return
        elif not sequence.is_growth_needed:
            # A refused prefetch harms nobody: the least that is needed is asked for when it is needed.
            sequence.growth_refused = True
            return
        elif isinstance(answer.error, PoolExhaustedError):
            # Nobody was left to give way to it. It gives way itself, and goes on when there is room.
            self.preempt(answer.cache_id)
            return
        raise LeaseError(sequence, answer.error)

    def computed(self, chunk: Chunk) -> None:
        """The step of a chunk was committed."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        self.seal_full(sequence)
        self._note_prompt(sequence)

    def seal_full(self, sequence: Sequence) -> None:
        """Asks to seal the blocks that became full; to be called after the step that wrote them was committed."""
        if self._hasher is None or not sequence.can_seal:
            return
        first, full = sequence.num_seals_asked, sequence.num_computed // self.block_size
        if first >= full:
            return
        hashes = sequence.block_hashes(self._hasher, full)
        for index in range(first, full):
            block_id = int(sequence.block_ids[index])
            self._port.seal(
                SealAsk(sequence.cache_id, index, block_id, hashes[index + 1], hashes[index], self.block_size)
            )
        sequence.num_seals_asked = full

    def sealed(self, answer: BlockSealed) -> None:
        """Takes a seal in: a deduplicated block takes the place of its duplicate, which is given back."""
        sequence = self._seated.get(answer.cache_id)
        if sequence is None:
            return  # of a lease that was given back whole, its duplicates with it
        sequence.num_sealed = max(sequence.num_sealed, answer.block_index + 1)  # answers come front to back
        if answer.block_id == answer.asked_block_id:
            return
        sequence.switch_block(answer.block_index, answer.block_id)
        self._port.release_block(answer.cache_id, answer.asked_block_id)

    def seal_refused(self, answer: SealRefused) -> None:
        """Nothing after a block that is not sealed can be."""
        sequence = self._seated.get(answer.cache_id)
        if sequence is not None:
            if answer.reason and sequence.can_seal:
                _log.warning("seal_refused", **sequence.log_ids, reason=answer.reason)
            sequence.can_seal = False

    def held(self) -> list[HeldLease]:
        """Every lease that is held now."""
        return [seq.held_lease() for seq in self._seated.values() if seq.state is SequenceState.RUNNING]

    def plan(self) -> list[Chunk]:
        """The chunks of the next step: decodes first, then prefills by priority and age. Asks for the leases of what comes after."""
        if self._block_size is None:
            return []
        self._seat_waiting()
        running = [seq for seq in self._seated.values() if seq.state is SequenceState.RUNNING]
        running.sort(key=lambda sequence: sequence.order)
        decodes = [seq for seq in running if seq.num_remaining == 1]
        prefills = [seq for seq in running if seq.num_remaining > 1]
        budget = self._settings.max_num_batched_tokens
        chunks: list[Chunk] = []
        for sequence in (*decodes, *prefills):
            # Without room, or too far ahead of its seals, it waits this step out, and the others go on.
            num_tokens = min(sequence.num_remaining, budget, self._room(sequence))
            if self._waits_for_seal(sequence, num_tokens):
                num_tokens = 0
                self.num_held_back += 1
            self._grow(sequence, num_tokens)
            if num_tokens > 0:
                chunks.append(Chunk(sequence, num_tokens))
                budget -= num_tokens
        return chunks

    def _room(self, sequence: Sequence) -> int:
        return len(sequence.block_ids) * self.block_size - sequence.num_computed

    def _waits_for_seal(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether, with so many more tokens, a crash of this process would cost more than is promised.

        That is 2 * block_size - 1 tokens to compute again, the newest one included, and for a prefill a step's tokens more. So a
        decode goes on for almost a block while the seal of the block before is under way, and waits only for one that takes longer.
        """
        is_answer_due = sequence.can_seal and sequence.num_sealed < sequence.num_seals_asked
        if not self.answers_seals or not is_answer_due:
            return False
        most = 2 * self.block_size - 1
        if sequence.num_remaining > 1:
            most += self._settings.max_num_batched_tokens
        num_known = sequence.num_computed + num_tokens + 1  # the token that is sampled then has no K/V yet
        return num_known - sequence.num_sealed * self.block_size > most

    def _seat_waiting(self) -> None:
        while self._waiting and len(self._seated) < self._settings.max_seqs:
            sequence = self._waiting.pop(0)
            leader = sequence.leader
            if leader is not None and leader.state is not SequenceState.ENDED and not leader.has_prompt:
                sequence.state = SequenceState.FOLLOWING
                leader.followers.append(sequence)
                continue
            num_blocks = blocks_for(len(sequence.token_ids) + 1, self.block_size)
            if self._settings.reserve_full:
                num_blocks = blocks_for(self._settings.kv_capacity, self.block_size)
            sequence.take_seat(next(self._cache_ids), num_blocks)
            self._seated[sequence.cache_id] = sequence
            if leader is not None and self._may_fork(sequence, leader):
                sequence.is_forking = True
                shared = sequence.num_shareable // self.block_size
                self._port.fork(ForkAsk(leader.cache_id, sequence.cache_id, num_blocks, shared))
            else:
                self._port.acquire(self._acquire_ask(sequence, num_blocks))

    def _may_fork(self, sequence: Sequence, leader: Sequence) -> bool:
        """Whether it asks for its leader's blocks. A resumed one does not: its own output may be cached, too."""
        if self._hasher is None or sequence.is_fork_refused or sequence.num_outputs:
            return False
        return leader.state is SequenceState.RUNNING

    def _note_prompt(self, sequence: Sequence) -> None:
        if sequence.followers and sequence.has_prompt:
            self._free_followers(sequence)

    def _free_followers(self, leader: Sequence) -> None:
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.state = SequenceState.WAITING
            # Its request is as old as its leader. A ticket that it has already is the same.
            follower.age_ticket = leader.age_ticket
            self.add(follower)

    def _acquire_ask(self, sequence: Sequence, num_blocks: int) -> AcquireAsk:
        request = sequence.request
        prefix: list[bytes] = []
        if self._hasher is not None:
            # The last token is computed in any case: the next one is sampled from it.
            prefix = sequence.block_hashes(self._hasher, (len(sequence.token_ids) - 1) // self.block_size)[1:]
        return AcquireAsk(
            sequence.cache_id,
            num_blocks,
            request.priority,
            request.tenant,
            sequence.age_ticket,
            prefix_hashes=tuple(prefix),
            is_patient=sequence.is_under_way,
        )

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Asks for more blocks when, after this step, less than one is spare."""
        room = self._room(sequence) - num_tokens
        held = len(sequence.block_ids)
        most = blocks_for(sequence.num_prompt + sequence.request.max_tokens, self.block_size)
        if sequence.num_blocks_asked or room >= self.block_size or held >= most:
            return
        if sequence.growth_refused:
            if self._room(sequence) > 0:
                return
            target = held + 1
        else:
            target = min(held + self._settings.growth_blocks, most)
        sequence.num_blocks_asked = target
        sequence.is_growth_needed = self._room(sequence) == 0
        self._port.extend(ExtendAsk(sequence.cache_id, target, sequence.is_growth_needed))

    def _give_up_seat(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.FOLLOWING and sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif self._seated.pop(sequence.cache_id, None) is not None:
            self._port.release(sequence.cache_id)
