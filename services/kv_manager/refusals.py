"""What a request of a lease is refused with, where more than one operation refuses it."""

from __future__ import annotations

from services.kv_manager.errors import CacheIdReusedError, LeaseRevokedError
from services.kv_manager.sessions import Lease


def released_error(cache_id: int) -> CacheIdReusedError:
    """A request for a lease that the session has given back."""
    return CacheIdReusedError(
        f"cache {cache_id} was released in this session: a late Acquire leases nothing, and ids are never reused",
        {"cache_id": str(cache_id)},
    )


def revoked_error(lease: Lease) -> LeaseRevokedError:
    """A request of a lease that has to give way."""
    return LeaseRevokedError(
        f"cache {lease.cache_id} has to give way to an older request: seal what is full, release it, and acquire again"
        " with its age_ticket",
        {"cache_id": str(lease.cache_id), "age_ticket": str(lease.age_ticket)},
    )
