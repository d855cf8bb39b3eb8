"""What a worker says to register, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.kv_manager.errors import InvalidRequestError
from services.kv_manager.geometry import Geometry
from services.kv_manager.meta_format import WorkerRecord
from services.kv_manager.sessions import Session


@dataclass(frozen=True)
class Claim:
    """A lease that a worker says it still holds."""

    cache_id: int
    blocks: list[int]
    priority: int
    tenant: str
    age_ticket: int


@dataclass(frozen=True)
class Registration:
    """A RegisterWorker request, its form checked. `worker` has epoch 0 still."""

    worker: WorkerRecord
    geometry: Geometry
    mapped_pool_id: bytes
    claims: Sequence[Claim]


@dataclass(frozen=True)
class Registered:
    """The answer to a registration."""

    session: Session
    claims_accepted: bool
    lost_cache_ids: list[int]


def check_claims(claims: Sequence[Claim], num_blocks: int) -> None:
    """Raises InvalidRequestError when claims contradict themselves or the pool."""
    cache_ids: set[int] = set()
    for index, claim in enumerate(claims):
        field = f"claims[{index}]"
        if claim.cache_id in cache_ids:
            raise InvalidRequestError(f"{field}.cache_id", f"{claim.cache_id} is claimed twice")
        cache_ids.add(claim.cache_id)
        if not claim.blocks:
            raise InvalidRequestError(f"{field}.block_ids", "is empty; a lease has at least one block")
        if len(set(claim.blocks)) != len(claim.blocks) or max(claim.blocks) >= num_blocks:
            raise InvalidRequestError(f"{field}.block_ids", f"has a block twice, or one not below {num_blocks}")
