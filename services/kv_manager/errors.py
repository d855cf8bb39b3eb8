"""What can go wrong in the manager, as types; one table at the end says how each looks at the edge.

Domain code raises these and knows nothing of gRPC. `message` tells a person what happened and what to do; `metadata`
tells a program.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.rpc import status_pb2

from protos import rich_status


class ManagerError(Exception):
    """Root of the tree; carries what a rich status needs."""

    # The request's field that is wrong, or the subject whose quota is used up; None where the error has none.
    field: str | None = None
    quota_subject: str | None = None
    retry_delay_s: float | None = None

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})


class InternalError(ManagerError):
    """A bug: something that this code does not foresee was raised."""


class StartError(ManagerError):
    """The service cannot start: a flag, the pool directory or its files are not usable."""


class PoolFileError(StartError):
    """A pool's files are damaged, of another format version, or of another geometry than asked for."""


class PoolLockedError(StartError):
    """Another manager holds this pool directory."""


class StoppingError(ManagerError):
    """The manager ends its streams, because it is about to stop."""

    retry_delay_s = 1.0


class InvalidRequestError(ManagerError):
    """A request that no state of the manager could answer."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", {"field": field})
        self.field = field


class StaleEpochError(ManagerError):
    """The epoch is not that of the worker's session: the worker must register."""


class StaleCallError(ManagerError):
    """A late copy of a call that has ended for its worker already."""


class StaleRegistrationError(ManagerError):
    """A late copy of a registration, of this process or of a predecessor."""


class SessionRevokedError(ManagerError):
    """The session was silent or hung for too long; the worker must release or re-claim what it holds."""


class PoolMismatchError(ManagerError):
    """The worker's geometry is not the pool's."""


class PoolSizeError(ManagerError):
    """The pool cannot be made: the size that the flags give holds no block, or too many."""


class LockProofError(ManagerError):
    """The worker's lock file does not prove what a registration needs it to prove."""


class PredecessorLivesError(ManagerError):
    """A process that had the worker's name may still write the blocks that it held; it is ending, and the next attempt may succeed."""

    retry_delay_s = 0.1


class TooManyWorkersError(ManagerError):
    """All worker slots are taken."""


class CacheIdReusedError(ManagerError):
    """An Acquire of a cache id that was released in this session."""


class UnackedCallsError(ManagerError):
    """The worker's acknowledged sequence number does not advance, so tombstones pile up."""


class UnknownLeaseError(ManagerError):
    """No lease of this cache id in the session."""


class NeverFitsError(ManagerError):
    """More blocks than the pool, or the worker's capacity, will ever have."""


class SealRefusedError(ManagerError):
    """A block that cannot be sealed as asked; it stays as it is, and its worker may go on writing it."""


class LeaseRevokedError(ManagerError):
    """The lease has to give way to an older one: it can only be sealed and released."""


class PoolExhaustedError(ManagerError):
    """Too few free blocks now: `missing` more are needed. Its text is written when somebody reads it, because a full
    pool refuses often, and a waiter is refused many times before it is served."""

    retry_delay_s = 1.0

    def __init__(
        self,
        cache_id: int,
        *,
        needed: int,
        free: int,
        num_blocks: int,
        size_flag: str,
        pool_id: bytes,
        priority: int,
        age_ticket: int,
    ) -> None:
        Exception.__init__(self, cache_id)
        self.cache_id = cache_id
        self.missing = needed - free
        # They keep the request's place for its next attempt.
        self.priority = priority
        self.age_ticket = age_ticket
        self._numbers = (needed, free, num_blocks)
        self._size_flag = size_flag
        self._pool_id = pool_id

    @property
    def message(self) -> str:  # type: ignore[override]
        """What happened and what to do."""
        needed, free, num_blocks = self._numbers
        reserved = "" if needed > free else ", set aside for an older request"
        return (
            f"cache {self.cache_id} needs {needed} blocks and {free} of {num_blocks} are free{reserved}: raise the manager's"
            f" {self._size_flag}, or lower the decoders' --max-seqs"
        )

    @property
    def metadata(self) -> dict[str, str]:  # type: ignore[override]
        """The numbers of the message."""
        needed, free, num_blocks = self._numbers
        return {
            "cache_id": str(self.cache_id),
            "needed_blocks": str(needed),
            "free_blocks": str(free),
            "num_blocks": str(num_blocks),
            "age_ticket": str(self.age_ticket),
        }

    @property
    def quota_subject(self) -> str:  # type: ignore[override]
        """The pool."""
        return f"pool:{self._pool_id.hex()}"

    def __str__(self) -> str:
        return self.message


class TenantQuotaError(ManagerError):
    """The tenant's leases hold as many blocks as it may have."""

    retry_delay_s = 1.0

    def __init__(self, message: str, metadata: Mapping[str, str], tenant: str) -> None:
        super().__init__(message, metadata)
        self.quota_subject = f"tenant:{tenant}"


class StorageFullError(ManagerError):
    """The file system of the pool directory has no room for the pool's files."""

    retry_delay_s = 5.0

    def __init__(self, message: str, metadata: Mapping[str, str], path: str) -> None:
        super().__init__(message, metadata)
        self.quota_subject = f"filesystem:{path}"


_EDGE: dict[type[ManagerError], tuple[grpc.StatusCode, str]] = {
    StoppingError: (grpc.StatusCode.UNAVAILABLE, "STOPPING"),
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    StaleEpochError: (grpc.StatusCode.ABORTED, "STALE_EPOCH"),
    StaleCallError: (grpc.StatusCode.ABORTED, "STALE_CALL"),
    StaleRegistrationError: (grpc.StatusCode.ABORTED, "STALE_REGISTRATION"),
    SessionRevokedError: (grpc.StatusCode.ABORTED, "SESSION_REVOKED"),
    PoolMismatchError: (grpc.StatusCode.FAILED_PRECONDITION, "POOL_MISMATCH"),
    PoolSizeError: (grpc.StatusCode.FAILED_PRECONDITION, "POOL_SIZE"),
    LockProofError: (grpc.StatusCode.FAILED_PRECONDITION, "LOCK_PROOF"),
    PredecessorLivesError: (grpc.StatusCode.ABORTED, "PREDECESSOR_LIVES"),
    TooManyWorkersError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WORKERS"),
    CacheIdReusedError: (grpc.StatusCode.FAILED_PRECONDITION, "CACHE_ID_RELEASED"),
    UnackedCallsError: (grpc.StatusCode.FAILED_PRECONDITION, "ACKED_SEQ_STUCK"),
    UnknownLeaseError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_LEASE"),
    NeverFitsError: (grpc.StatusCode.OUT_OF_RANGE, "NEVER_FITS"),
    SealRefusedError: (grpc.StatusCode.FAILED_PRECONDITION, "SEAL_REFUSED"),
    LeaseRevokedError: (grpc.StatusCode.ABORTED, "LEASE_REVOKED"),
    TenantQuotaError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA"),
    PoolExhaustedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED"),
    StorageFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
    PoolFileError: (grpc.StatusCode.FAILED_PRECONDITION, "POOL_FILE"),
}


def to_status(error: ManagerError) -> status_pb2.Status:
    """The rich status of a domain error; INTERNAL for a type that the table does not name."""
    code, reason = _EDGE.get(type(error), (grpc.StatusCode.INTERNAL, "INTERNAL"))
    return rich_status.make_status(
        code,
        error.message,
        reason=reason,
        metadata=error.metadata,
        field=error.field,
        quota_subject=error.quota_subject,
        retry_delay_s=error.retry_delay_s,
    )
