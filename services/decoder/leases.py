"""The engine's side of its leases: what it asks of whoever owns the blocks, and what comes back into its inbox.

Every method of a port returns at once, and every answer is a message, because lease traffic is never on the token path:
a step waits for nothing, and leaves out the sequences that lack blocks or are too far ahead of their seals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.decoder.errors import DecoderError
from services.decoder.kv_view import KvView


@dataclass(frozen=True)
class KvGeometry:
    """What one model stores for each token; fixed for the life of the engine."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: str  # "bf16", "f16", "f32" or "int8"
    model_fingerprint: bytes  # 32 bytes
    kv_layout: str = "hnd"  # or "nhd"


@dataclass(frozen=True)
class AcquireAsk:
    """A lease that a sequence wants, all or nothing."""

    cache_id: int  # never used before in this process
    num_blocks: int
    priority: int
    tenant: str
    age_ticket: int | None  # as issued before; None: a new arrival
    # Content hashes of the full blocks at the front, without the block of the last token, which is always computed.
    prefix_hashes: tuple[bytes, ...] = ()
    # Its stream is under way, so that it waits for blocks rather than fails.
    is_patient: bool = False


@dataclass(frozen=True)
class ForkAsk:
    """A lease that shares what is sealed at the front of another: of its full blocks, max_shared_blocks at most."""

    parent_cache_id: int
    cache_id: int  # never used before in this process
    num_blocks: int
    max_shared_blocks: int


@dataclass(frozen=True)
class ExtendAsk:
    """A lease that is to grow to num_blocks in all. A needed one may make others give way; a prefetch never does."""

    cache_id: int
    num_blocks: int
    is_needed: bool


@dataclass(frozen=True)
class SealAsk:
    """A block that is full, and that nobody writes any more."""

    cache_id: int
    block_index: int  # place in the table
    block_id: int
    content_hash: bytes
    parent_hash: bytes
    num_tokens: int


@dataclass(frozen=True)
class HeldLease:
    """A lease that the engine holds at a step boundary: what a session claims when it is opened anew."""

    cache_id: int
    block_ids: tuple[int, ...]
    priority: int
    tenant: str
    age_ticket: int | None


@dataclass(frozen=True)
class PoolReady:
    """The K/V is mapped and leases can be asked for. Any lease of before is void."""

    kv: KvView
    block_size: int
    can_seal: bool = False  # its blocks can be sealed, found again and shared


@dataclass(frozen=True)
class ManagerAway:
    """The session broke off: new requests fail, running ones go on in the blocks that they hold."""

    reason: str


@dataclass(frozen=True)
class SessionEnded:
    """The session is being opened anew: what was asked is answered after ManagerBack or PoolReady."""


@dataclass(frozen=True)
class ManagerBack:
    """The session was opened anew and every lease that the engine holds was claimed again."""


@dataclass(frozen=True)
class LeaseGranted:
    """The whole table of a lease, after Acquire, Fork or Extend."""

    cache_id: int
    block_ids: Sequence[int]
    num_cached_tokens: int
    age_ticket: int | None


@dataclass(frozen=True)
class LeaseRefused:
    """An Acquire, Fork or Extend that leased nothing; what was held before is still held."""

    cache_id: int
    error: DecoderError


@dataclass(frozen=True)
class LeaseRevoked:
    """The lease must be released at the next step boundary; may come more than once."""

    cache_id: int


@dataclass(frozen=True)
class BlockSealed:
    """The manager's table names block_id at this place from now on: another than was asked for when its content was there before.

    The engine switches its own table, and gives asked_block_id back, between two steps.
    """

    cache_id: int
    block_index: int
    asked_block_id: int
    block_id: int


@dataclass(frozen=True)
class SealRefused:
    """A block stays as it is, unsealed, and so do all that follow it in its table."""

    cache_id: int
    reason: str = ""  # empty: the lease is gone, and nobody needs to know


@dataclass(frozen=True)
class ClaimsWanted:
    """The engine answers, at a step boundary, with every lease that it holds. `answer` may be called from its thread."""

    answer: Callable[[Sequence[HeldLease]], None]


LeaseMessage = (
    PoolReady
    | ManagerAway
    | SessionEnded
    | ManagerBack
    | LeaseGranted
    | LeaseRefused
    | LeaseRevoked
    | BlockSealed
    | SealRefused
    | ClaimsWanted
)
Post = Callable[[LeaseMessage], None]


class LeasePort(Protocol):
    """Who leases blocks to the engine, which calls all but `open` and `close` on its own thread."""

    def bind(self, geometry: KvGeometry, post: Post, busy_ms: Callable[[], int | None]) -> None:
        """Called once, when the model is loaded. `post` takes messages from any thread; `busy_ms` is the age of the present step."""
        ...

    def acquire(self, ask: AcquireAsk) -> None:
        """Asks for a lease; LeaseGranted or LeaseRefused follows unless it is released before."""
        ...

    def fork(self, ask: ForkAsk) -> None:
        """Asks for a lease that shares another's blocks, sealed before it; LeaseGranted or LeaseRefused follows unless it is released
        before. Never waits for blocks. Only where PoolReady said can_seal.
        """
        ...

    def extend(self, ask: ExtendAsk) -> None:
        """Asks for a lease to grow; LeaseGranted or LeaseRefused follows unless it is released before."""
        ...

    def seal(self, ask: SealAsk) -> None:
        """Asks to seal a block, front to back; BlockSealed or SealRefused follows. Only where PoolReady said can_seal."""
        ...

    def release(self, cache_id: int) -> None:
        """Gives a lease back, or withdraws an Acquire; what was to be sealed is sealed first. No step in flight touches its blocks."""
        ...

    def release_block(self, cache_id: int, block_id: int) -> None:
        """Gives back one block that BlockSealed has replaced in the table. No step in flight touches it."""
        ...

    async def open(self) -> None:
        """Called by the server once the engine has started: opens the session, or goes on trying in the background.

        Raises ConfigError when it can never succeed as configured.
        """
        ...

    async def close(self) -> None:
        """Called by the server after the engine has stopped: waits, for a bounded time, until all releases are answered."""
        ...
