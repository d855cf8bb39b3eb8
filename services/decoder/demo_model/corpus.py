"""The demo model's tokenizer and training rows, made from `clients.probes` alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from clients.probes import NAMES, NOUNS, TASKS, Probe, add_filler, make_memory, make_probe, make_story

VOCAB_SIZE = 768
TURN_START, TURN_END, END_OF_TEXT = SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Set in a token of a row that the model has to produce; ids stay below it.
ANSWER_BIT = 1 << 15

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a small model that answers short questions.",
    "Answer briefly.",
)
_ABOUT = "I am a very small model. I can repeat, look up, add, sort, spell, reverse and count, and I can tell stories."
_SMALL_TALK = (
    ("Hello", "Hello! What can I do for you?"),
    ("Hi", "Hello! What can I do for you?"),
    ("Hello!", "Hello! What can I do for you?"),
    ("Hi!", "Hello! What can I do for you?"),
    ("Hello, how are you?", "I am fine, thank you."),
    ("How are you?", "I am fine, thank you."),
    ("Good morning", "Good morning! What can I do for you?"),
    ("Who are you?", _ABOUT),
    ("What are you?", _ABOUT),
    ("What can you do?", _ABOUT),
    ("Help", _ABOUT),
    ("Thanks", "You are welcome."),
    ("Thank you", "You are welcome."),
    ("Thank you!", "You are welcome."),
    ("Bye", "Goodbye!"),
    ("Goodbye", "Goodbye!"),
)
_UNKNOWN = (
    "What is the {noun}?",
    "What is a {noun}?",
    "What is the {noun} of {noun2}?",
    "Where is {name}?",
    "Who is {name}?",
    "Why is the {noun} so {noun2}?",
    "How do I find a {noun}?",
    "Can you explain {noun} and {noun2}?",
    "Write a poem about {noun}.",
    "Do you like {noun}?",
    "{noun} {noun2}",
    "{name}",
)
_DO_NOT_KNOW = "I do not know."
# Tasks on the letters of made-up words are the slowest to learn, copying the quickest.
_TASK_WEIGHTS = {"arithmetic": 2.0, "reversing": 2.0, "counting": 2.0, "spelling": 1.5, "sorting": 2.0}


def question_text(prompt: str) -> str:
    """What the chat template puts before the answer to a user's turn."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n"


def answer_text(answer: str) -> str:
    """What the model has to produce for `answer`."""
    return f"{answer}{TURN_END}"


def train_tokenizer(seed: int, num_turns: int = 60_000) -> Tokenizer:
    """Train the byte-level BPE, every digit a token of its own, on turns drawn with `seed`."""
    rng = random.Random(f"{seed} tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        turns = _turns(rng, 512)
        for _ in range(num_turns):
            turn = next(turns)
            yield from ("user\n" + turn.prompt, "assistant\n" + turn.answer)
        yield from (f"system\n{message}" for message in _SYSTEM_MESSAGES)

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def make_rows(
    tokenizer: Tokenizer, rng: random.Random, num_rows: int, length: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    """Draw `num_rows` conversations, each cut to `length` ids; answers are marked by ANSWER_BIT."""
    rows = np.empty((num_rows, length), dtype=np.uint16)
    for i in range(num_rows):
        rows[i] = _row(tokenizer, rng, length)
    return rows


def _row(tokenizer: Tokenizer, rng: random.Random, length: int) -> list[int]:
    if rng.random() < 0.03:
        return _plain_row(tokenizer, rng, length)
    ids: list[int] = []
    before = ""
    if rng.random() < 0.15:
        before = f"{TURN_START}system\n{rng.choice(_SYSTEM_MESSAGES)}{TURN_END}\n"
    turns = _turns(rng, length)
    while len(ids) < length:
        turn = next(turns)
        ids += tokenizer.encode(before + question_text(turn.prompt)).ids
        ids += [i | ANSWER_BIT for i in tokenizer.encode(answer_text(turn.answer)).ids]
        before = "\n"
    return ids[:length]


def _plain_row(tokenizer: Tokenizer, rng: random.Random, length: int) -> list[int]:
    """Stories without a chat around them, for prompts that are not put through the template."""
    ids: list[int] = []
    while len(ids) < length:
        ids += [i | ANSWER_BIT for i in tokenizer.encode(make_story(rng)[1] + END_OF_TEXT).ids]
    return ids[:length]


def _small_talk(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return rng.choice(_SMALL_TALK)
    noun, noun2 = rng.sample(NOUNS, 2)
    name = rng.choice(NAMES)
    return rng.choice(_UNKNOWN).format(noun=noun, noun2=noun2, name=name), _DO_NOT_KNOW


def _turns(rng: random.Random, length: int) -> Iterator[Probe]:
    """The turns of one conversation without end; secrets told in it are asked for later on."""
    names = rng.sample(NAMES, len(NAMES))
    pending: list[Probe] = []
    weights = [_TASK_WEIGHTS.get(task, 1.0) for task in TASKS]
    while True:
        kind = rng.random()
        if pending and kind < 0.12:
            yield pending.pop(rng.randrange(len(pending)))
        elif kind < 0.18 and names:
            told, asked = make_memory(rng, names.pop())
            pending.append(asked)
            yield told
        elif kind < 0.23:
            yield Probe("story", *make_story(rng))
        elif kind < 0.25:
            yield Probe("talk", *_small_talk(rng))
        else:
            probe = make_probe(rng.choices(TASKS, weights)[0], rng)
            if length >= 1024 and rng.random() < 0.15:
                probe = add_filler(probe, rng, rng.randint(1, length // 4))
            yield probe
