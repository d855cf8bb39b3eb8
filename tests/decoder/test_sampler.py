"""Sampling: filters, noise, logprobs and penalties."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decoder.errors import EngineFailedError
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, keep, sample_rows, uniform

Logits = npt.NDArray[np.float32]

# Few distinct values, so that ties are common.
logit_rows = st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)
params_of_noise = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64 - 1),
)


def _row(params: SamplingParams, **options: Any) -> RowSampling:
    defaults: dict[str, Any] = {"sample_index": 0, "position": 0, "num_logprobs": None}
    return RowSampling(params, **(defaults | options))


def _draw(logits: Logits, params: SamplingParams, **options: Any) -> int:
    return int(sample_rows(logits[None], [_row(params, **options)]).token_ids[0])


@given(logit_rows)
def test_greedy_takes_the_best_and_of_equals_the_lowest_id(logits: Logits) -> None:
    values = logits.tolist()
    assert _draw(logits, SamplingParams()) == values.index(max(values))


@given(logit_rows, params_of_noise)
def test_filters_keep_what_their_definitions_say(logits: Logits, params: SamplingParams) -> None:
    ids, weights = keep(logits, params)
    probabilities = np.exp(logits.astype(np.float64) / params.temperature)
    by_rank = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = by_rank[: params.top_k] if params.top_k else by_rank
    total, mass, nucleus = sum(probabilities[i] for i in kept), 0.0, []
    for token in kept:
        if params.top_p < 1.0 and mass >= params.top_p * total * (1 + 1e-12):
            break
        nucleus.append(token)
        mass += probabilities[token]
    expected = [i for i in nucleus if probabilities[i] >= params.min_p * probabilities[nucleus[0]] * (1 - 1e-12)]
    # On the very edge of top_p or min_p, rounding decides; away from it, the sets agree.
    strict = [i for i in expected if probabilities[i] >= params.min_p * probabilities[nucleus[0]] * (1 + 1e-12)]
    assert set(ids.tolist()) <= set(expected)
    assert len(ids) >= len(strict) - 1
    assert by_rank[0] in ids
    assert ids.tolist() == sorted(ids.tolist())
    assert np.allclose(weights / weights.sum(), probabilities[ids] / probabilities[ids].sum())


@given(logit_rows, params_of_noise, st.integers(0, 3), st.integers(0, 1000))
def test_a_draw_is_a_pure_function_of_seed_sample_index_and_position(
    logits: Logits, params: SamplingParams, sample_index: int, position: int
) -> None:
    row = _row(params, sample_index=sample_index, position=position)
    alone = int(sample_rows(logits[None], [row]).token_ids[0])
    others = [_row(params, position=p) for p in range(3)]
    crowd = sample_rows(np.stack([logits] * 4), [*others[:2], row, others[2]])
    assert crowd.token_ids[2] == alone
    assert alone in keep(logits, params)[0]


def test_noise_is_uniform_and_each_counter_has_its_own() -> None:
    draws = np.array([uniform(seed, index, at) for seed in range(20) for index in range(5) for at in range(200)])
    assert len(set(draws.tolist())) == len(draws)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.bincount((draws * 100).astype(int), minlength=100)
    assert _chi_square(counts, np.full(100, len(draws) / 100)) < 149  # p = 0.001 with 99 degrees of freedom
    assert uniform(1, 2, 3) == 0.06763884205546289  # a change of the noise breaks running streams


@pytest.mark.parametrize(
    ("params", "limit"),
    [
        (SamplingParams(temperature=1.0, seed=7), 24.3),  # p = 0.001 with 7 degrees of freedom
        (SamplingParams(temperature=0.5, top_k=5, seed=8), 18.5),  # 4
        (SamplingParams(temperature=2.0, top_p=0.8, seed=2**64 - 1), 22.5),  # at most 6
        (SamplingParams(temperature=1.3, min_p=0.2, seed=9), 22.5),
    ],
)
def test_tokens_have_the_distribution_of_the_kept_weights(params: SamplingParams, limit: float) -> None:
    logits = np.array([0.3, 2.0, -1.0, 1.5, 1.5, 0.0, -0.5, 0.9], np.float32)
    num_draws = 20_000
    rows = [_row(params, position=position) for position in range(num_draws)]
    drawn = Counter(sample_rows(np.broadcast_to(logits, (num_draws, 8)), rows).token_ids.tolist())
    ids, weights = keep(logits, params)
    assert set(drawn) <= set(ids.tolist())
    observed = np.array([drawn[token_id] for token_id in ids.tolist()])
    assert _chi_square(observed, weights / weights.sum() * num_draws) < limit


def _chi_square(observed: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_extremes_of_noise_and_temperature_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 3.0, -200.0, -np.inf], np.float32)
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        for noise in (0.0, 1 - 2.0**-53):
            monkeypatch.setattr("services.decoder.sampler.uniform", lambda *_, noise=noise: noise)
            assert _draw(logits, SamplingParams(temperature=temperature)) in (1, 3, 4)
    assert _draw(logits, SamplingParams(temperature=1e-30)) == 3


@settings(max_examples=50)
@given(logit_rows, st.integers(0, 6), st.floats(0.0, 2.0))
def test_logprobs_are_those_of_the_raw_distribution(logits: Logits, num_logprobs: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=1, logit_bias={0: 100.0})
    sampled = sample_rows(logits[None], [_row(params, num_logprobs=num_logprobs)])
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    assert sampled.token_ids[0] == 0
    assert sampled.logprobs[0] == pytest.approx(expected[0])
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:num_logprobs]
    assert [token_id for token_id, _ in sampled.top[0]] == order
    assert [logprob for _, logprob in sampled.top[0]] == pytest.approx(expected[order].tolist())


def test_without_logprobs_none_are_computed() -> None:
    sampled = sample_rows(np.zeros((2, 3), np.float32), [_row(SamplingParams())] * 2)
    assert sampled.logprobs == [None, None]
    assert sampled.top == [(), ()]
    assert sampled.token_ids.dtype == np.int32


def test_penalties_bias_and_bans_change_only_their_tokens() -> None:
    logits = np.array([4.0, 3.0, 2.0, -1.0], np.float32)
    counts, seen = {0: 2}, frozenset({0, 3})
    assert _draw(logits, SamplingParams(frequency_penalty=0.4), output_counts=counts) == 0
    assert _draw(logits, SamplingParams(frequency_penalty=0.6), output_counts=counts) == 1
    assert _draw(logits, SamplingParams(presence_penalty=0.9), output_counts=counts) == 0
    assert _draw(logits, SamplingParams(presence_penalty=1.1), output_counts=counts) == 1
    assert _draw(logits, SamplingParams(repetition_penalty=1.4), seen_token_ids=seen) == 1
    assert _draw(logits, SamplingParams(repetition_penalty=1.3), seen_token_ids=seen) == 0
    assert _draw(-logits, SamplingParams(repetition_penalty=0.1), seen_token_ids=frozenset({0})) == 3
    assert _draw(logits, SamplingParams(logit_bias={2: 2.5})) == 2
    assert _draw(logits, SamplingParams(), banned_token_ids=frozenset({0, 1})) == 2
    noisy = SamplingParams(temperature=5.0)
    drawn = {_draw(logits, noisy, position=p, banned_token_ids=frozenset({0, 2})) for p in range(200)}
    assert drawn == {1, 3}
    assert logits.tolist() == [4.0, 3.0, 2.0, -1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(EngineFailedError, match="not finite"):
        _draw(np.array([0.0, bad, 1.0], np.float32), SamplingParams())
