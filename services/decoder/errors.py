"""Everything that can go wrong in a decoder, as a tree, and the one table that maps it to gRPC at the edge."""

from __future__ import annotations

import grpc
from google.rpc import status_pb2

from protos.rich_status import make_status


class DecoderError(Exception):
    """The root. `reason` is the stable, machine-readable name of the error; the message names the field and the fix."""

    reason = "INTERNAL"
    retry_delay_s: float | None = None  # when to ask again, where that may help
    quota_subject: str | None = None  # what is used up, where something is


class InvalidRequestError(DecoderError):
    """A field of the request is wrong; `field` is its path in GenerateRequest."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class NotServedError(DecoderError):
    """The request asks for a feature that this decoder does not serve; `field` is its path in GenerateRequest."""

    reason = "NOT_SERVED"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class NeverFitsError(DecoderError):
    """The prompt and max_tokens exceed what one request may ever hold."""

    reason = "NEVER_FITS"


class PoolExhaustedError(DecoderError):
    """The pool has no blocks for the request now; carries the manager's own status with its details."""

    reason = "POOL_EXHAUSTED"

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class QueueFullError(DecoderError):
    """As many requests wait at this decoder as may; another one may have room."""

    reason = "QUEUE_FULL"
    retry_delay_s = 1.0
    quota_subject = "queue"

    def __init__(self, num_waiting: int, num_new: int, max_waiting: int) -> None:
        super().__init__(
            f"{num_waiting} requests wait for a seat in the batch, and with {num_new} more they would be beyond --max-waiting "
            f"{max_waiting}: ask later, or another decoder; add a decoder, or raise --max-waiting and let them wait longer"
        )


class ManagerUnavailableError(DecoderError):
    """The KV manager is away, and the request needs it."""

    reason = "MANAGER_UNAVAILABLE"
    retry_delay_s = 1.0


class ShuttingDownError(DecoderError):
    """The decoder is stopping; another one, or a restarted one, can take the request over."""

    reason = "SHUTTING_DOWN"
    retry_delay_s = 1.0


class DuplicateRequestError(DecoderError):
    """A request of this id is running."""

    reason = "DUPLICATE_REQUEST_ID"


class EngineFailedError(DecoderError):
    """A step failed inside the engine; the request was given up, and the service goes on."""

    reason = "ENGINE_FAILED"


class CheckpointError(DecoderError):
    """A checkpoint cannot be served: the message names the file, the key or tensor, and the fix. Ends the start-up."""

    reason = "BAD_CHECKPOINT"


class ConfigError(DecoderError):
    """A command-line value is wrong: the message names the flag and the fix. Ends the start-up."""

    reason = "BAD_CONFIG"


_CODES: dict[type[DecoderError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotServedError: grpc.StatusCode.UNIMPLEMENTED,
    NeverFitsError: grpc.StatusCode.OUT_OF_RANGE,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ManagerUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ShuttingDownError: grpc.StatusCode.UNAVAILABLE,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}


def to_status(error: DecoderError) -> status_pb2.Status:
    """The rich status of an error, as it crosses the edge."""
    if isinstance(error, PoolExhaustedError):
        return error.status
    return make_status(
        _CODES.get(type(error), grpc.StatusCode.INTERNAL),
        str(error),
        reason=error.reason,
        field=getattr(error, "field", None),
        quota_subject=error.quota_subject,
        retry_delay_s=error.retry_delay_s,
    )
