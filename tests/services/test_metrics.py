"""The endpoint over a real socket, and the histogram against what Prometheus means by one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.metrics import Histogram, MetricsEndpoint, check_metrics_address, histogram_family
from services.serving import AddressError

DEADLINE_S = 30.0


class OneGauge(Collector):
    """A collector with a figure that the test sets."""

    value = 0.0

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("one", "A figure.", value=self.value)


async def ask(address: str, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer to some bytes."""
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        await writer.drain()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    return head, body


async def test_answers_what_is_true_now() -> None:
    collector = OneGauge()
    endpoint = MetricsEndpoint(collector)
    await endpoint.start("127.0.0.1:0")
    for value in (1.0, 2.0):
        collector.value = value
        head, body = await ask(endpoint.address, b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n")
        families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"text/plain; version=0.0.4" in head
        assert families["one"].samples[0].value == value
        assert "process_resident_memory_bytes" in families
    endpoint.stop()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /metrics?name=one HTTP/1.1\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"\r\n\r\n", b"405"),
        (b"\xff\x00 \xff\r\n\r\n", b"405"),
        (b"GET\r\n\r\n", b"404"),
    ],
)
async def test_answers_only_get_of_its_path(request_bytes: bytes, status: bytes) -> None:
    endpoint = MetricsEndpoint(OneGauge())
    await endpoint.start("127.0.0.1:0")
    head, _ = await ask(endpoint.address, request_bytes)
    assert head.split(b" ")[1] == status
    endpoint.stop()


async def test_an_endless_head_is_cut_off() -> None:
    endpoint = MetricsEndpoint(OneGauge())
    await endpoint.start("127.0.0.1:0")
    assert await ask(endpoint.address, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == (b"", b"")
    endpoint.stop()


async def test_a_taken_address_is_an_error_that_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"--metrics-listen: cannot listen on {address}: Address already in use"):
            await MetricsEndpoint(OneGauge()).start(address)


@pytest.mark.parametrize("address", ["unix:/tmp/x", "9000", "host:", ":9000", "host:70000", "a b:1"])
def test_a_wrong_address_is_an_error_that_names_the_flag(address: str) -> None:
    with pytest.raises(AddressError, match="--metrics-listen"):
        check_metrics_address(address)


def test_two_endpoints_share_nothing() -> None:
    for _ in range(2):
        MetricsEndpoint(OneGauge())


def test_histogram_counts_a_value_on_a_bound_below_it() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert (histogram.count, histogram.sum) == (5, 14.0)


def test_a_histogram_family_has_buckets_count_and_sum_for_each_label() -> None:
    low, high = Histogram((1,)), Histogram((1,))
    low.observe(0.5)
    high.observe(3)
    family = histogram_family("x_seconds", "Some.", {"low": low, "high": high}, "part")
    values = {(sample.name, *sample.labels.values()): sample.value for sample in family.samples}
    assert values["x_seconds_bucket", "low", "1.0"] == 1
    assert values["x_seconds_bucket", "high", "1.0"] == 0
    assert values["x_seconds_count", "high"] == 1
    assert values["x_seconds_sum", "high"] == 3
