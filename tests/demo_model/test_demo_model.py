"""The committed checkpoint loads in mlx-lm, answers what it never saw, and fits its size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from clients.probes import NAMES, TASKS, Probe, add_filler, make_memory, make_probe, make_story
from services.decoder.demo_model import checkpoint_dir
from services.decoder.demo_model.corpus import answer_text, question_text

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

END_OF_TURN = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, wrapper = mlx_lm.load(str(checkpoint_dir()))
    return model, wrapper


def generate(loaded: tuple[Any, Any], *messages: str, max_tokens: int = 80) -> str:
    """The greedy answer to the last of `messages`, which start with the user's and alternate."""
    model, wrapper = loaded
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": message} for i, message in enumerate(messages)]
    prompt = wrapper.apply_chat_template(chat, add_generation_prompt=True)
    return str(mlx_lm.generate(model, wrapper, prompt=prompt, max_tokens=max_tokens))


def share_right(loaded: tuple[Any, Any], probes: list[Probe]) -> float:
    """How many greedy answers, their end included, are right: one forward pass a probe.

    Greedy decoding gives an answer exactly if each of its tokens is the most likely one after the
    tokens before it.
    """
    model, wrapper = loaded
    right = 0
    for probe in probes:
        question = wrapper.encode(question_text(probe.prompt))
        answer = wrapper.encode(answer_text(probe.answer))
        logits = model(mx.array([question + answer]))
        best = mx.argmax(logits[0, len(question) - 1 : -1], axis=-1).tolist()
        right += best == answer
    return right / len(probes)


def test_it_is_at_most_8_mb_and_complete() -> None:
    files = [path for path in checkpoint_dir().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 8_000_000
    assert {path.name for path in checkpoint_dir().iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_log_gives_the_seed_and_99_percent_in_every_task() -> None:
    log = Path(checkpoint_dir().parent / "training_log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    assert events[0]["event"] == "settings"
    assert isinstance(events[0]["seed"], int)
    final = [event for event in events if event["event"] == "held_out" and "activations" in event]
    assert {event["activations"] for event in final} == {"torch.float32", "torch.bfloat16"}
    for event in final:
        assert set(TASKS) <= set(event["accuracy"])
        assert min(event["accuracy"].values()) >= 0.99


def test_the_tokenizer_gives_back_any_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    texts = [make_probe(task, rng).prompt for task in TASKS for _ in range(20)]
    texts += [make_story(rng)[1], "naïve 日本 🦓\n\ttabs  and  spaces ", "", "\x00\x7f"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 768


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert not [token for token in vocabulary if len(token) > 1 and any(c.isdigit() for c in token)]


def test_special_tokens_are_single_ids_that_end_a_turn(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>").ids == [0, 1, 2]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((checkpoint_dir() / name).read_text())["eos_token_id"] == [END_OF_TURN, 2]


def test_the_chat_template_renders_the_turns_that_the_model_was_trained_on(loaded: tuple[Any, Any]) -> None:
    _, wrapper = loaded
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Repeat: zebra-4821"},
    ]
    text = wrapper.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = question_text("Hi") + answer_text("Hello!") + "\n" + question_text("Repeat: zebra-4821")
    assert text == expected


@pytest.mark.parametrize("task", TASKS)
def test_held_out_probes_are_answered(loaded: tuple[Any, Any], task: str) -> None:
    rng = random.Random(f"quick {task}")
    assert share_right(loaded, [make_probe(task, rng, held_out=True) for _ in range(8)]) == 1.0


def test_streams_stop_at_the_end_of_the_answer(loaded: tuple[Any, Any]) -> None:
    rng = random.Random(11)
    for task in ("recall", "recite", "reversing"):
        probe = make_probe(task, rng, held_out=True)
        assert generate(loaded, probe.prompt) == probe.answer


def test_an_earlier_turn_is_remembered(loaded: tuple[Any, Any]) -> None:
    told, asked = make_memory(random.Random(12), "Mara", held_out=True)
    between = make_probe("arithmetic", random.Random(13))
    messages = (told.prompt, told.answer, between.prompt, between.answer, asked.prompt)
    assert generate(loaded, *messages) == asked.answer


def test_a_story_runs_for_a_while_and_ends(loaded: tuple[Any, Any]) -> None:
    text = generate(loaded, "Tell me a story about Mara the fox.", max_tokens=300)
    assert "Mara" in text
    _, wrapper = loaded
    assert 80 <= len(wrapper.encode(text)) < 300


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", TASKS)
def test_99_percent_of_held_out_probes_are_answered(loaded: tuple[Any, Any], task: str) -> None:
    rng = random.Random(f"full {task}")
    assert share_right(loaded, [make_probe(task, rng, held_out=True) for _ in range(300)]) >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_prompts_are_answered(loaded: tuple[Any, Any]) -> None:
    rng = random.Random(14)
    probes = [add_filler(make_probe("recall", rng, held_out=True), rng, words) for words in (300, 1000, 1400)]
    assert share_right(loaded, probes) == 1.0


@pytest.mark.slow
def test_secrets_of_many_are_not_mixed_up(loaded: tuple[Any, Any]) -> None:
    rng = random.Random(15)
    pairs = [make_memory(rng, name, held_out=True) for name in rng.sample(NAMES, 4)]
    messages = [text for told, _ in pairs for text in (told.prompt, told.answer)]
    for _, asked in pairs:
        assert generate(loaded, *messages, asked.prompt) == asked.answer
