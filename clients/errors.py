"""Everything that can go wrong for a client, as a tree, and the one place that reads it off a gRPC status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from protos.rich_status import error_info, retry_delay_s

_DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """The root of all errors that the client library raises on purpose."""


class BadTargetError(ClientError):
    """An address that no client can dial; the message says how to write one."""


class ProtocolError(ClientError):
    """A decoder broke the contract of protos/decoder.proto: going on could repeat or lose tokens."""


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What a failed call said about itself. `retry_delay_s` is the server's wish in seconds, None when it has none."""

    code: grpc.StatusCode
    message: str
    target: str
    reason: str = ""  # machine-readable name, from ErrorInfo
    field: str = ""  # path of the wrong field in the request, from BadRequest
    metadata: Mapping[str, str] = dataclass_field(default_factory=dict)
    retry_delay_s: float | None = None


class CallError(ClientError):
    """A call that ended with a status other than OK; `details` holds everything that the server told."""

    def __init__(self, details: ErrorDetails) -> None:
        super().__init__(f"{details.code.name} from {details.target}: {details.message}")
        self.details = details

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code that ended the call."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The machine-readable name of the error; empty when the server gave none."""
        return self.details.reason


class UnavailableError(CallError):
    """The service is unreachable, stopping, or waiting for another one; the same call may succeed later."""


class DeadlineError(CallError):
    """The caller's own deadline passed."""


class CallCancelledError(CallError):
    """Somebody other than the caller cancelled the call."""


class RequestRefusedError(CallError):
    """The service understood the call and says no; the same call will be refused again."""


class ExhaustedError(RequestRefusedError):
    """The service has no room now; `details.retry_delay_s` says when to ask again."""


class ServiceFailedError(CallError):
    """The service failed inside."""


class DecoderUnavailable(UnavailableError):
    """No decoder could take the request for as long as the caller was willing to wait.

    `num_attempts` counts the failed attempts since the last progress, over `outage_s` seconds without a stream.
    """

    def __init__(self, details: ErrorDetails, num_attempts: int, outage_s: float) -> None:
        super().__init__(details)
        self.num_attempts = num_attempts
        self.outage_s = outage_s


_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def call_error(error: grpc.aio.AioRpcError, target: str) -> CallError:
    """The typed error of a failed call to `target`, with the details that its status carries."""
    details = _details(error, target)
    if details.code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(details)
    if details.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(details)
    if details.code is grpc.StatusCode.CANCELLED:
        return CallCancelledError(details)
    if details.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ExhaustedError(details)
    if details.code in _REFUSALS:
        return RequestRefusedError(details)
    return ServiceFailedError(details)


def _details(error: grpc.aio.AioRpcError, target: str) -> ErrorDetails:
    status = _rich_status(error)
    message = error.details() or "the call failed without a message"
    if status is None:
        return ErrorDetails(error.code(), message, target)
    info = error_info(status)
    return ErrorDetails(
        code=error.code(),
        message=message,
        target=target,
        reason=info.reason,
        field=_violated_field(status),
        metadata=dict(info.metadata),
        retry_delay_s=retry_delay_s(status),
    )


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    metadata: Sequence[tuple[str, str | bytes]] = tuple(error.trailing_metadata() or ())
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:  # a proxy's garbage must not hide the code and the message
                return None
    return None


def _violated_field(status: status_pb2.Status) -> str:
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(bad_request) and bad_request.field_violations:
            return str(bad_request.field_violations[0].field)
    return ""
