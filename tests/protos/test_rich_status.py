"""Rich statuses read back as they were made."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2

from protos.rich_status import error_info, make_status, retry_delay_s, status_code


def test_a_status_carries_every_detail_it_was_given() -> None:
    status = make_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "no blocks",
        reason="POOL_EXHAUSTED",
        metadata={"cache_id": "7"},
        field="items",
        quota_subject="pool",
        retry_delay_s=0.25,
    )
    assert status_code(status) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_info(status).reason == "POOL_EXHAUSTED"
    assert error_info(status).metadata["cache_id"] == "7"
    assert retry_delay_s(status) == 0.25
    names = [detail.type_url.rsplit(".", 1)[1] for detail in status.details]
    assert names == ["ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo"]


def test_a_status_without_details_has_no_reason_and_no_delay() -> None:
    status = make_status(grpc.StatusCode.ABORTED, "stale", reason="STALE_EPOCH")
    assert retry_delay_s(status) is None
    del status.details[:]
    assert error_info(status) == error_details_pb2.ErrorInfo()
