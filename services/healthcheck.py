"""Asks a service of its health, for container health checks: `python -m services.healthcheck ADDRESS SERVICE`."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def is_serving(address: str, service: str, timeout_s: float) -> bool:
    """Whether the service answers SERVING within timeout_s."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m services.healthcheck ADDRESS SERVICE")
    sys.exit(0 if is_serving(sys.argv[1], sys.argv[2], timeout_s=4.0) else 1)
