"""How many requests an engine lets wait, and what it says to those that come then."""

from __future__ import annotations

from typing import Any

import pytest

from services.decoder.engine import EngineSettings
from services.decoder.errors import ConfigError, DecoderError, QueueFullError, ShuttingDownError
from services.decoder.open_requests import OpenRequests
from tests.decoder.engine_fakes import EngineHarness, PooledLeases, expected_tokens, make_request


class Door:
    """Open requests, and what was handed over."""

    def __init__(self, max_seqs: int, max_waiting: int) -> None:
        self.requests = OpenRequests(EngineSettings(max_seqs=max_seqs, max_waiting=max_waiting))
        self.taken: list[str] = []

    def ask(self, *names: str, **changes: Any) -> DecoderError | None:
        """What it says to one request with these samples; None: it takes them."""
        samples = [make_request(name, **changes) for name in names]
        try:
            self.requests.add(samples, lambda: self.taken.extend(names))
        except DecoderError as error:
            return error
        return None


def test_the_batch_and_the_queue_are_filled_and_the_next_request_is_refused() -> None:
    door = Door(max_seqs=2, max_waiting=3)
    for name in "abcde":
        door.requests.require_room()
        assert door.ask(name) is None
    refusal = door.ask("f")
    assert isinstance(refusal, QueueFullError)
    assert str(refusal).startswith("3 requests wait for a seat in the batch, and with 1 more")
    assert "raise --max-waiting" in str(refusal)
    with pytest.raises(QueueFullError):
        door.requests.require_room()
    assert door.taken == list("abcde")
    assert "f" not in door.requests
    door.requests.remove(["c"])
    assert door.ask("f") is None


def test_no_queue_at_all_still_fills_the_batch() -> None:
    door = Door(max_seqs=2, max_waiting=0)
    assert [door.ask(name) is None for name in "abc"] == [True, True, False]


def test_each_sample_of_a_request_counts_and_all_are_taken_or_none() -> None:
    door = Door(max_seqs=4, max_waiting=2)
    assert door.ask("a0", "a1", "a2", "a3") is None
    assert isinstance(door.ask("b0", "b1", "b2"), QueueFullError)
    assert "b0" not in door.requests
    assert door.ask("c0", "c1") is None


def test_a_resumed_request_is_taken_however_many_wait_and_counts_among_them() -> None:
    door = Door(max_seqs=1, max_waiting=1)
    for name in "abc":
        assert door.ask(name, is_resumed=True) is None
    assert isinstance(door.ask("new"), QueueFullError)
    door.requests.remove(["a", "b"])
    assert door.ask("new") is None


def test_who_shuts_down_says_so_even_with_a_full_queue() -> None:
    door = Door(max_seqs=1, max_waiting=0)
    door.ask("a")
    door.requests.close()
    assert isinstance(door.ask("b"), ShuttingDownError)
    with pytest.raises(ShuttingDownError):
        door.requests.require_room()


def test_an_engine_with_a_full_queue_finishes_those_it_has_and_then_takes_more() -> None:
    settings = EngineSettings(max_seqs=1, kv_capacity=64, max_num_batched_tokens=16, max_waiting=2)
    requests = [make_request(name) for name in "abc"]
    with EngineHarness(PooledLeases(64, 4), settings) as harness:
        harness.model.gate.clear()
        for request in requests:
            harness.engine.submit(request)
        with pytest.raises(QueueFullError):
            harness.engine.submit(make_request("late"))
        resumed = make_request(
            "late", output_token_ids=tuple(expected_tokens(make_request("late"))[:3]), is_resumed=True
        )
        harness.engine.submit(resumed)
        harness.model.gate.set()
        for request in requests:
            assert harness.outcome(request.request_id).tokens == expected_tokens(request)
        assert harness.outcome("late").tokens == expected_tokens(make_request("late"))[3:]
        harness.engine.require_room()
        assert harness.run(make_request("later"))[0].tokens == expected_tokens(make_request("later"))


def test_a_negative_limit_is_refused_by_its_flag() -> None:
    with pytest.raises(ConfigError, match="--max-waiting: -1"):
        EngineSettings(max_waiting=-1)
