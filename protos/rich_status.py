"""google.rpc.Status messages as both services send them and the clients read them.

Source of the format: google/rpc/status.proto and google/rpc/error_details.proto (AIP-193).
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "leasehold"


def make_status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str,
    metadata: Mapping[str, str] | None = None,
    field: str | None = None,
    quota_subject: str | None = None,
    retry_delay_s: float | None = None,
) -> status_pb2.Status:
    """A status with ErrorInfo (`reason`, `metadata`) and, when given, BadRequest, QuotaFailure and RetryInfo."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(metadata or {})),
    ]
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if quota_subject is not None:
        quota = error_details_pb2.QuotaFailure.Violation(subject=quota_subject, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if retry_delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_delay_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [any_pb2.Any() for _ in details]
    for slot, detail in zip(packed, details, strict=True):
        slot.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of a status; UNKNOWN for a number that gRPC does not define."""
    for code in grpc.StatusCode:
        if code.value[0] == status.code:
            return code
    return grpc.StatusCode.UNKNOWN


def error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a status; an empty one when it carries none."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return info
    return error_details_pb2.ErrorInfo()


def retry_delay_s(status: status_pb2.Status) -> float | None:
    """Seconds to wait before a retry, or None when the status has no RetryInfo."""
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToMilliseconds()) / 1000
    return None
