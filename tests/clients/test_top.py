"""The live view's pictures, and what it reads off a Prometheus endpoint."""

from __future__ import annotations

import asyncio

import pytest

from clients.cli.top import View, block_map, frame
from clients.metrics import decoder_figures, parse_samples, scrape, step_parts
from protos import kv_manager_pb2 as pb

METRICS = """\
# HELP leasehold_decoder_tokens_total tokens
leasehold_decoder_tokens_total{phase="prefill"} 100
leasehold_decoder_tokens_total{phase="decode"} 40.0
leasehold_decoder_requests_waiting 3
leasehold_decoder_requests_running 5
leasehold_decoder_step_seconds_sum 2.5
leasehold_decoder_step_seconds_count 50
leasehold_decoder_step_part_seconds_sum{part="forward",quote="a\\"b"} 1.5
leasehold_decoder_step_part_seconds_sum{part="sample"} 0.5
"""


def view(num_blocks: int = 8) -> View:
    stats = pb.StatsResponse(num_blocks=num_blocks, free=num_blocks - 5, leased=2, num_looked_up=10, num_hits=4)
    leases = [
        pb.Lease(worker_id="one", cache_id=1, block_ids=[0, 2]),
        pb.Lease(worker_id="two", cache_id=2, block_ids=[5]),
        pb.Lease(worker_id="two", cache_id=3, block_ids=[7], revoked=True),
    ]
    sessions = [pb.Session(worker_id=name, state="live", num_leases=1, pid=4) for name in ("two", "one")]
    states = bytes([1, 0, 2, 0, 3, 1, 0, 4]).ljust(num_blocks, b"\0")
    return View(stats, pb.ListLeasesResponse(sessions=sessions, leases=leases, block_states=states))


def test_the_map_shows_the_state_of_every_block() -> None:
    lines = block_map(view(), width=6, max_lines=10, paints={"one": 0, "two": 0})
    assert lines[:2] == ["█·▓·░", "█·X"]


def test_a_large_pool_has_several_blocks_a_cell() -> None:
    lines = block_map(view(1000), width=11, max_lines=1, paints={})
    assert lines[0] == "X·········"
    assert "100 blocks a cell" in lines[1]


def test_colours_come_by_holder_and_only_when_asked_for() -> None:
    coloured = "\n".join(frame(view(), 80, 40, colour=True))
    assert "\x1b[34m█\x1b[0m" in coloured
    assert "\x1b[32m█\x1b[0m" in coloured
    assert "\x1b" not in "\n".join(frame(view(), 80, 40, colour=False))


@pytest.mark.parametrize("height", [3, 10, 40])
def test_a_frame_fits_the_terminal(height: int) -> None:
    lines = frame(view(10_000), 60, height, colour=False)
    assert len(lines) <= height
    text = "\n".join(frame(view(), 100, 40, colour=False))
    assert "hits 40.0% of 10 looked up" in text
    assert "two" in text


def test_a_pool_that_is_not_there_yet() -> None:
    empty = View(pb.StatsResponse(), pb.ListLeasesResponse())
    assert "no pool yet" in "\n".join(frame(empty, 80, 24, colour=False))


def test_rates_come_from_two_looks() -> None:
    first = decoder_figures(1.0, parse_samples(METRICS))
    later = METRICS.replace(" 40.0", " 90.0").replace("sum 2.5", "sum 2.7").replace("count 50", "count 60")
    second = decoder_figures(2.0, parse_samples(later))
    text = "\n".join(frame(View(pb.StatsResponse(), pb.ListLeasesResponse(), {"d:1": (first, second)}), 80, 24, False))
    row = next(line for line in text.splitlines() if line.startswith("d:1"))
    assert row.split() == ["d:1", "50", "5", "3", "20.0"]


def test_step_parts_are_found_by_their_label() -> None:
    assert step_parts(parse_samples(METRICS)) == {"forward": 1.5, "sample": 0.5}


async def test_an_endpoint_is_scraped() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + METRICS.encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        samples = await scrape(f"127.0.0.1:{port}")
    assert ("leasehold_decoder_requests_waiting", {}, 3.0) in samples
