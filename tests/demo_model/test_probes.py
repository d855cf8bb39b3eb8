"""The probes have one right answer each, varied enough to tell streams apart, in two splits."""

from __future__ import annotations

import random
import re

import pytest

from clients.probes import (
    TASKS,
    Probe,
    add_filler,
    is_correct,
    is_held_out,
    make_memory,
    make_probe,
    make_story,
)


def solve(probe: Probe) -> str:
    """The answer worked out from the prompt alone, another way than the generator does."""
    prompt = probe.prompt
    if prompt.startswith("Repeat: "):
        return prompt.removeprefix("Repeat: ")
    if prompt.startswith("Spell: "):
        return "-".join(prompt.removeprefix("Spell: "))
    if prompt.startswith("Reverse: "):
        return "".join(reversed(prompt.removeprefix("Reverse: ")))
    if prompt.startswith("Sort: "):
        items = prompt.removeprefix("Sort: ").split()
        return " ".join(sorted(items, key=lambda item: (item.isdigit() and int(item), item)))
    if match := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", prompt):
        a, b = int(match[1]), int(match[3])
        return str(a + b if match[2] == "+" else a - b)
    if match := re.fullmatch(r"How many times is (.) in (\w+)\?", prompt):
        return str(len(re.findall(match[1], match[2])))
    match = re.search(r"What does (\w+) have\?$", prompt)
    assert match is not None, prompt
    [answer] = re.findall(rf"\b{match[1]} has ([^ ]+)\.", prompt)
    return str(answer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_probe_has_the_one_answer_that_its_prompt_implies(task: str, held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(300):
        probe = make_probe(task, rng, held_out)
        assert probe.task == task
        assert solve(probe) == probe.answer
        assert probe.answer == probe.answer.strip() != ""
        assert is_held_out(probe.prompt) == held_out
        assert is_correct(probe, f" {probe.answer}\n")
        assert not is_correct(probe, probe.answer + "0")


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_probes(task: str) -> None:
    first, second = random.Random(7), random.Random(7)
    assert [make_probe(task, first) for _ in range(20)] == [make_probe(task, second) for _ in range(20)]


@pytest.mark.parametrize("task", ["recall", "recite", "lookup"])
def test_answers_that_tell_streams_apart_hardly_ever_repeat(task: str) -> None:
    rng = random.Random(2)
    answers = {make_probe(task, rng).answer for _ in range(1000)}
    assert len(answers) >= 995


def test_filler_lengthens_a_question_and_leaves_its_answer_and_its_split() -> None:
    rng = random.Random(3)
    for held_out in (False, True):
        probe = make_probe("lookup", rng, held_out)
        long_probe = add_filler(probe, rng, 500)
        assert len(long_probe.prompt.split()) >= 500
        assert long_probe.prompt.endswith(probe.prompt)
        assert long_probe.answer == probe.answer
        assert is_held_out(long_probe.prompt) == held_out


def test_a_secret_is_told_in_one_turn_and_asked_for_in_another() -> None:
    told, asked = make_memory(random.Random(4), "Mara", held_out=True)
    assert asked.answer in told.prompt
    assert asked.answer not in told.answer
    assert "Mara" in asked.prompt
    assert is_held_out(told.prompt)


def test_stories_are_long_and_differ() -> None:
    rng = random.Random(5)
    stories = [make_story(rng) for _ in range(100)]
    assert len({text for _, text in stories}) == 100
    assert all(70 <= len(text.split()) <= 220 for _, text in stories)
    assert all("{" not in prompt + text for prompt, text in stories)
