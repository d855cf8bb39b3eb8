"""Sampling in C draws the tokens and reports the logprobs of `sampler.sample_rows`, bit for bit, whatever is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.decoder.errors import EngineFailedError
from services.decoder.ops.native import NativeOps
from services.decoder.ops.native.sampling import sample
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, Sampled, sample_rows, weights_of
from tests.decoder.native.conftest import ISAS

Logits = npt.NDArray[np.float32]

# Around the sizes of a vector, a tile, a block and a chunk.
VOCAB_SIZES = (1, 2, 7, 8, 9, 63, 65, 768, 1023, 1024, 1025, 2500, 16_384, 16_385, 33_000)


def draw(ops: NativeOps, logits: Logits, rows: list[RowSampling]) -> Sampled:
    return sample(ops._lib, ops._context, logits, rows)


def all_ops() -> list[NativeOps]:
    return [NativeOps(isa=isa, threads=threads) for isa in ISAS for threads in (1, 3)]


@st.composite
def params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    if draw(st.booleans()):
        return SamplingParams()
    return SamplingParams(
        temperature=draw(st.sampled_from((1.0, 0.7, 1e-3, 1e-30, 5.0, 1e30)) | st.floats(0.05, 5.0)),
        top_k=draw(st.sampled_from((0, 0, 1, 2, 50)) | st.integers(0, vocab_size + 1)),
        top_p=draw(st.sampled_from((1.0, 0.95, 0.0, 1 - 1e-12, 1e-300)) | st.floats(0.0, 1.0)),
        min_p=draw(st.sampled_from((0.0, 0.05, 1.0, 1e-300)) | st.floats(0.0, 1.0)),
        seed=draw(st.integers(0, 2**64 - 1)),
        frequency_penalty=draw(st.sampled_from((0.0, 0.5))),
        presence_penalty=draw(st.sampled_from((0.0, 0.5))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3))),
        logit_bias=draw(st.sampled_from(({}, {0: 3.5}, {0: -100.0}))),
    )


@st.composite
def rows_to_sample(draw: st.DrawFn) -> tuple[Logits, list[RowSampling]]:
    """Logits of several kinds: spread, full of ties, all alike, rising, with minus infinities and both zeros."""
    size, count = draw(st.sampled_from(VOCAB_SIZES)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = [
        rng.normal(0, 4, size),
        rng.integers(-3, 4, size) / 2,
        np.zeros(size),
        np.linspace(-30, 20, size),
        rng.choice([-np.inf, -0.0, 0.0, 1.5], size),
    ]
    logits = np.stack([kinds[draw(st.integers(0, len(kinds) - 1))] for _ in range(count)]).astype(np.float32)
    logits[np.isneginf(logits[:, 0]), 0] = 0.0  # so that something is left where the last is banned
    rows = [
        RowSampling(
            draw(params(size)),
            sample_index=draw(st.integers(0, 3)),
            position=draw(st.integers(0, 1000)),
            num_logprobs=draw(st.sampled_from((None, None, 0, 1, 20))),
            output_counts={0: 2, size - 1: 1},
            seen_token_ids=frozenset({0, size // 2}),
            banned_token_ids=draw(st.sampled_from((frozenset[int](), frozenset({size - 1} if size > 1 else ())))),
        )
        for _ in range(count)
    ]
    return logits, rows


@settings(max_examples=200, deadline=None)
@given(case=rows_to_sample())
def test_every_instruction_set_and_thread_count_gives_the_bits_of_the_reference(
    case: tuple[Logits, list[RowSampling]],
) -> None:
    logits, rows = case
    before = logits.copy()
    expected = sample_rows(logits, rows)
    for ops in OPS:
        drawn = draw(ops, logits, rows)
        assert drawn.token_ids.tolist() == expected.token_ids.tolist()
        assert drawn.logprobs == expected.logprobs  # of doubles, without a tolerance
        assert [tuple(top) for top in drawn.top] == [tuple(top) for top in expected.top]
    assert np.array_equal(before, logits)


OPS = all_ops()


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 50}, {"top_k": 40_000}, {"top_p": 0.95}, {"top_p": 1.0 - 1e-10}, {"min_p": 0.02}]
)
def test_a_vocabulary_of_152_k_is_drawn_from_as_the_reference_does(temperature: float, filters: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (4, 151_936)).astype(np.float32)
    rows = [
        RowSampling(
            SamplingParams(temperature=temperature, seed=9, **filters), 0, position, 5 if position % 2 else None
        )
        for position in range(4)
    ]
    expected, drawn = sample_rows(logits, rows), draw(OPS[-1], logits, rows)
    assert drawn.token_ids.tolist() == expected.token_ids.tolist()
    assert drawn.logprobs == expected.logprobs
    assert list(drawn.top) == list(expected.top)


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=100), temperature=st.floats(0.01, 100.0))
@example(logits=[0.0, -700.0, -699.9, -701.0], temperature=1.0)
def test_weights_are_exponentials_to_four_units_in_the_last_place(logits: list[float], temperature: float) -> None:
    array = np.array(logits, np.float32)
    exponents = (array.astype(np.float64) - array.max()) / temperature
    exact = np.exp(exponents.astype(np.longdouble))
    found = weights_of(array, temperature)
    kept = exponents >= -700
    assert (found[~kept] == 0).all()
    assert np.abs(found[kept] / exact[kept] - 1).max() < 4 * 2**-52
    assert found.max() == 1.0


def test_logprobs_are_those_of_float64() -> None:
    logits = np.random.default_rng(4).normal(0, 5, (3, 20_000)).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = (
        wide
        - np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - wide.max(axis=1, keepdims=True)
    )
    for ops in OPS:
        drawn = draw(ops, logits, [RowSampling(SamplingParams(), 0, 0, 3)] * 3)
        for row in range(3):
            order = np.argsort(-logits[row], kind="stable")[:3]
            assert [token_id for token_id, _ in drawn.top[row]] == order.tolist()
            assert [logprob for _, logprob in drawn.top[row]] == pytest.approx(expected[row, order].tolist(), rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "all below"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_an_error_that_names_the_logit(bad: Any, temperature: float) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[1, slice(None) if bad == "all below" else 77] = -np.inf if bad == "all below" else bad
    rows = [RowSampling(SamplingParams(temperature), 0, 0, 1)] * 2
    for ops in OPS:
        with pytest.raises(EngineFailedError, match="token 0 has -inf" if bad == "all below" else "token 77"):
            draw(ops, logits, rows)


def test_a_ban_may_take_the_only_logit_that_is_not_finite() -> None:
    logits = np.array([[1.0, np.nan, 0.5]], np.float32)
    row = RowSampling(SamplingParams(), 0, 0, None, banned_token_ids=frozenset({1}))
    for ops in OPS:
        assert draw(ops, logits, [row]).token_ids.tolist() == [0]


def test_no_rows_give_no_tokens() -> None:
    for ops in OPS:
        assert draw(ops, np.empty((0, 500), np.float32), []).token_ids.tolist() == []


@settings(max_examples=20, deadline=None)
@given(case=rows_to_sample())
def test_a_row_is_drawn_alone_as_in_company(case: tuple[Logits, list[RowSampling]]) -> None:
    logits, rows = case
    together = draw(OPS[-1], logits, rows)
    for index, row in enumerate(rows):
        alone = draw(OPS[-1], logits[index : index + 1], [row])
        assert int(alone.token_ids[0]) == int(together.token_ids[index])
        assert alone.logprobs[0] == together.logprobs[index]
