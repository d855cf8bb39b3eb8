"""One sequence: its tokens, how far its K/V reaches, and the lease that holds it. Touched by the engine's thread only."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from services.decoder.block_hash import BlockHasher
from services.decoder.leases import HeldLease
from services.decoder.request import DecodeRequest, FinishReason
from services.decoder.sampler import RowSampling

_NO_BLOCKS: npt.NDArray[np.int32] = np.zeros(0, np.int32)
_NO_TOKENS: frozenset[int] = frozenset()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold num_tokens."""
    return -(-num_tokens // block_size)


class SequenceState(Enum):
    """Where a sequence is between its submission and its end."""

    FOLLOWING = "following"  # waits until another sample of its request has computed the prompt
    WAITING = "waiting"  # for a seat in the batch
    ACQUIRING = "acquiring"  # has a seat, its lease is asked for
    RUNNING = "running"  # holds its lease
    ENDED = "ended"


class Sequence:
    """The state of one request. `num_computed` tokens, from the front, have their K/V in the leased blocks."""

    def __init__(self, request: DecodeRequest, arrival: int, leader: Sequence | None = None) -> None:
        """`leader` is the sample of the same request that computes the prompt for all."""
        self.request = request
        self.arrival = arrival
        self.leader = leader  # until it runs
        self.followers: list[Sequence] = []  # FOLLOWING this one
        self.is_forking = False  # its lease is asked for as a fork of its leader's
        self.is_fork_refused = False
        self.age_ticket = request.age_ticket
        self.state = SequenceState.WAITING
        self.token_ids = array("i", request.prompt_token_ids)
        self.token_ids.extend(request.output_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.num_cached_tokens: int | None = None  # None until it is admitted for the first time
        self.cache_id = 0
        self.block_ids = _NO_BLOCKS
        self.num_blocks_asked = 0  # by an Acquire or Extend without an answer yet; 0: none
        self.growth_refused = False
        self.is_growth_needed = False  # of the Extend without an answer: it cannot go on without
        self.num_seals_asked = 0  # blocks at the front that are sealed, or asked to be
        self.num_sealed = 0  # of these, blocks that the manager has said are
        self.can_seal = True
        self._block_hashes: list[bytes] = []
        params = request.sampling
        wants_counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._output_counts = Counter(request.output_token_ids) if wants_counts else None
        self._seen = set(self.token_ids) if params.repetition_penalty != 1.0 else None

    @property
    def log_ids(self) -> dict[str, str | int]:
        """What every log line about it names."""
        return {**self.request.log_ids, "cache_id": self.cache_id}

    @property
    def num_outputs(self) -> int:
        """Generated tokens so far, those of before a resumption included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens whose K/V is not there yet; 1 when it decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """Sorts by falling priority, then by age: a ticket is older than none, because it was issued before."""
        return (-self.request.priority, self.age_ticket is None, self.age_ticket or 0, self.arrival)

    @property
    def has_prompt(self) -> bool:
        """Whether the K/V of its whole prompt is in its blocks."""
        return self.num_computed >= self.num_prompt

    @property
    def num_shareable(self) -> int:
        """Tokens at the front that it has in common with its leader, without its last one, which is always computed."""
        return min(self.num_prompt, len(self.token_ids) - 1)

    def take_seat(self, cache_id: int, num_blocks: int) -> None:
        """Its lease, of num_blocks, is being asked for."""
        self.state = SequenceState.ACQUIRING
        self.cache_id = cache_id
        self.num_blocks_asked = num_blocks

    def take_blocks(self, block_ids: SequenceOf[int]) -> None:
        """The table as granted."""
        self.block_ids = np.asarray(block_ids, np.int32)
        self.num_blocks_asked = 0
        self.growth_refused = False
        self.is_forking = False

    def grow(self, block_ids: SequenceOf[int]) -> None:
        """A longer table. What it holds already stays: an answer may be older than a switch to a deduplicated block."""
        held = len(self.block_ids)
        self.take_blocks([*self.block_ids.tolist(), *block_ids[held:]])

    def switch_block(self, index: int, block_id: int) -> None:
        """Another block holds the same content."""
        block_ids = self.block_ids.copy()
        block_ids[index] = block_id
        self.block_ids = block_ids

    def block_hashes(self, hasher: BlockHasher, num_blocks: int) -> list[bytes]:
        """The content hashes of the first num_blocks blocks, and before them the seed of the chain."""
        hashes, size = self._block_hashes, hasher.block_size
        if not hashes:
            hashes.append(hasher.seed(self.request.tenant))
        while len(hashes) <= num_blocks:
            start = (len(hashes) - 1) * size
            hashes.append(hasher.hash_block(hashes[-1], self.token_ids[start : start + size]))
        return hashes[: num_blocks + 1]

    def forget_hashes(self) -> None:
        """The pool has changed, and with it what a block is."""
        self._block_hashes.clear()

    def start(self, num_cached_tokens: int, age_ticket: int | None) -> bool:
        """It has its blocks and runs; says whether that is the first time."""
        first = self.num_cached_tokens is None
        if first:
            self.num_cached_tokens = num_cached_tokens
        self.num_computed = num_cached_tokens
        self.age_ticket = age_ticket if age_ticket is not None else self.age_ticket
        self.state = SequenceState.RUNNING
        return first

    @property
    def is_under_way(self) -> bool:
        """Whether its stream has begun somewhere: it waits for blocks rather than fails."""
        return self.num_cached_tokens is not None or self.request.age_ticket is not None or self.leader is not None

    def take_prompt(self, num_tokens: int) -> None:
        """The K/V of its first num_tokens has been copied into its blocks, before its first step."""
        self.num_computed = self.num_cached_tokens = num_tokens

    def unseat(self) -> None:
        """It lost or gave up its lease: a later one starts from nothing (S28)."""
        self.state = SequenceState.WAITING
        self.cache_id = 0
        self.block_ids = _NO_BLOCKS
        self.num_blocks_asked = 0
        self.growth_refused = False
        self.is_forking = False
        self.num_seals_asked = 0
        self.num_sealed = 0
        self.can_seal = True
        self.num_computed = 0

    def held_lease(self) -> HeldLease:
        """What it holds, as a claim."""
        blocks = tuple(self.block_ids.tolist())
        return HeldLease(self.cache_id, blocks, self.request.priority, self.request.tenant, self.age_ticket)

    def next_sampling(self) -> RowSampling:
        """How its next token is drawn."""
        request = self.request
        position = self.num_outputs
        return RowSampling(
            params=request.sampling,
            sample_index=request.sample_index,
            position=position,
            num_logprobs=request.num_logprobs,
            output_counts=self._output_counts,
            seen_token_ids=None if self._seen is None else frozenset(self._seen),
            banned_token_ids=request.stop_token_ids if position < request.min_tokens else _NO_TOKENS,
        )

    def append(self, token_id: int) -> None:
        """One more generated token."""
        self.token_ids.append(token_id)
        if self._output_counts is not None:
            self._output_counts[token_id] += 1
        if self._seen is not None:
            self._seen.add(token_id)

    def finish_reason(self) -> FinishReason | None:
        """Why its latest token ends it, or None when it goes on."""
        num_outputs = self.num_outputs
        if num_outputs == 0:
            return None
        if num_outputs >= self.request.min_tokens and self.token_ids[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_outputs >= self.request.max_tokens else None


@dataclass(frozen=True)
class Chunk:
    """The next num_tokens tokens of a sequence, as one step computes them."""

    sequence: Sequence
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """Whether the last token is among them, so that the next one is sampled."""
        return self.num_tokens == self.sequence.num_remaining
