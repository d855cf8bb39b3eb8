"""What fast mode costs in quality: the demo model's held-out probes with activations of bytes, beside float32 ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer

from clients.probes import TASKS, Probe, make_probe
from services.decoder.demo_model import checkpoint_dir
from services.decoder.demo_model.corpus import answer_text, question_text
from services.decoder.ops.native import NativeOps
from tests.decoder.model_driver import ModelDriver, load, make_contiguous
from tests.decoder.native.steps import Array

QUICK_PROBES = 8
FULL_PROBES = 400  # half a point is two of them
PROBES_OF_A_STEP = 16


class Answers:
    """The demo model's logits for the tokens of right answers."""

    def __init__(self, precision: str) -> None:
        self._model = load(checkpoint_dir(), NativeOps(precision))
        self._tokenizer = Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))

    def log_probabilities(self, probes: Sequence[Probe]) -> list[tuple[list[int], Array]]:
        """Of each probe, its answer's tokens, the end included, and log-probabilities [tokens, vocab_size] where each is chosen."""
        found = []
        for start in range(0, len(probes), PROBES_OF_A_STEP):
            found += self._step(probes[start : start + PROBES_OF_A_STEP])
        return found

    def _step(self, probes: Sequence[Probe]) -> list[tuple[list[int], Array]]:
        questions = [self._tokenizer.encode(question_text(probe.prompt)).ids for probe in probes]
        answers = [self._tokenizer.encode(answer_text(probe.answer)).ids for probe in probes]
        chunks = {str(i): q + a for i, (q, a) in enumerate(zip(questions, answers, strict=True))}
        kv = make_contiguous(self._model.config, "f32", max(map(len, chunks.values())), len(probes))
        driver = ModelDriver(self._model, kv, [kv.take() for _ in probes])
        batch = driver.batch(chunks)
        ends = np.cumsum([len(tokens) for tokens in chunks.values()])
        rows = [np.arange(end - len(answer) - 1, end - 1) for end, answer in zip(ends, answers, strict=True)]
        object.__setattr__(batch, "sample_rows", np.concatenate(rows).astype(np.int32))
        logits = self._model.logits(self._model.begin(batch, kv)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return list(zip(answers, np.split(logits, np.cumsum([len(answer) for answer in answers])[:-1]), strict=True))


def compare(num_probes: int) -> tuple[Array, dict[str, float]]:
    """KL(exact || fast) in nats at each answer token, and by task the points that fast mode loses.

    An answer is right if each of its tokens is the likeliest one: then greedy decoding gives it.
    """
    exact_mode, fast_mode = Answers("exact"), Answers("fast")
    divergences, lost = [], {}
    for task in TASKS:
        rng = random.Random(f"fast {task}")
        probes = [make_probe(task, rng, held_out=True) for _ in range(num_probes)]
        right = {"exact": 0, "fast": 0}
        for (answer, exact), (_, fast) in zip(
            exact_mode.log_probabilities(probes), fast_mode.log_probabilities(probes), strict=True
        ):
            divergences.append((np.exp(exact) * (exact - fast)).sum(axis=1))
            right["exact"] += exact.argmax(axis=1).tolist() == answer
            right["fast"] += fast.argmax(axis=1).tolist() == answer
        lost[task] = 100 * (right["exact"] - right["fast"]) / num_probes
    return np.concatenate(divergences), lost


@pytest.mark.parametrize(
    "num_probes", [QUICK_PROBES, pytest.param(FULL_PROBES, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_fast_mode_keeps_the_distribution_of_answers_and_their_accuracy(num_probes: int) -> None:
    kl, lost = compare(num_probes)
    print(f"KL mean {kl.mean():.2e}, p99 {np.quantile(kl, 0.99):.2e} nats over {len(kl)} tokens; points lost {lost}")
    assert kl.max() > 0  # the modes do differ
    assert kl.mean() <= 2e-3
    assert np.quantile(kl, 0.99) <= 1e-2
    assert max(lost.values()) <= 0.5
