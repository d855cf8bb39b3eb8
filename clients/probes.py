"""Questions with one right answer each, and made-up stories.

The demo model is trained on them. A wrong answer of a trained model points at the server: K/V of
another request, a lost block, a mixed-up stream. So answers are drawn from spaces large enough that
two requests hardly ever share one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

HELD_OUT_ONE_IN = 16
FILLER_SEPARATOR = "\n\n"

NOUNS: tuple[str, ...] = tuple(
    """acorn amber anchor apple arrow autumn badger bamboo banjo barley basket beacon beetle bell
    birch biscuit bison bottle branch bridge bronze brook bucket butter button cabin cactus camel
    candle canoe canyon carpet carrot castle cedar cherry chess circle clover cobalt coffee comet
    copper coral cotton crane cricket crystal cypress daisy dancer desert diamond dolphin donkey
    dragon drum eagle ember emerald engine falcon feather fern ferry fiddle finch flint flute forest
    fossil fountain fox galaxy garden garnet gecko ginger glacier goblet granite grape hammer harbor
    harvest hazel hedge heron hickory honey horizon hunter indigo island ivory jacket jaguar jasmine
    jasper jungle kettle kiwi koala ladder lagoon lantern lark laurel lava lemon lentil leopard
    lilac linen lizard lobster lotus magnet mango maple marble marigold market meadow melon meteor
    mirror monkey moss mountain mustard needle nettle nickel nutmeg oak oasis ocean olive onion opal
    orange orchid otter oyster paddle panda paper parrot peach pearl pebble pelican pepper pigeon
    pillow pine planet plum pocket poppy potato prairie pumpkin puzzle quartz rabbit radish raven
    reef ribbon river robin rocket rose ruby saddle saffron salmon sapphire scarf shadow shell
    silver sparrow spider spruce squirrel star stone summer sunset swan table tiger timber tomato
    topaz tower trumpet tulip tunnel turtle valley vanilla velvet violet violin walnut walrus wheat
    whistle willow window winter wolf yarrow yellow zebra zephyr zinc""".split()  # noqa: SIM905
)
NAMES: tuple[str, ...] = tuple(
    """Ada Alma Amir Anna Anton Arlo Asha Basil Bela Boris Bruno Carla Cleo Clara Cyrus Dana Dario
    Dora Edith Elias Ella Emil Enzo Erik Esme Eva Felix Finn Flora Frida Gita Greta Gus Hana Hugo
    Ida Igor Ines Iris Ivan Jana Jonas Jude Julia Kai Karim Kira Lars Lea Lena Leo Lila Lina Luca
    Luna Maia Malik Mara Marco Mila Mira Nadia Nico Nina Nora Odin Olga Omar Orla Oscar Otto Paola
    Petra Pia Quinn Ravi Rhea Rosa Ruben Sami Sara Selma Sven Tara Tess Theo Tilda Tom Uma Ursula
    Vera Viktor Wanda Willa Xenia Yara Yuri Zara Zeno Zoe""".split()  # noqa: SIM905
)

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Two, three and four bytes a character: a stream must not cut one in half.
_SCRIPTS = (
    "äöüßéèêàâçñøåæîôúíó",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "абвгдежзийклмнопрстуфхцчшщыэюя",
    "日本語中文山川水火木金土月人口目手足犬猫鳥魚",
    "🦓🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🦉🦆🌊🌙🌟🔥",
)


@dataclass(frozen=True)
class Probe:
    """A question, what kind it is, and the only right answer."""

    task: str
    prompt: str
    answer: str


def _code(rng: random.Random) -> str:
    return f"{rng.choice(NOUNS)}-{rng.randrange(10_000):04d}"


def _made_up_word(rng: random.Random, syllables: int) -> str:
    parts = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)]
    if rng.random() < 0.5:
        parts.append(rng.choice(_CONSONANTS))
    return "".join(parts)


def _recall(rng: random.Random) -> Probe:
    answer = _code(rng)
    return Probe("recall", f"Repeat: {answer}", answer)


def _recite(rng: random.Random) -> Probe:
    kind = rng.randrange(3)
    if kind == 0:
        nouns = rng.sample(NOUNS, rng.randint(3, 5))
        items = [f"{noun}-{rng.randrange(10_000):04d}" for noun in nouns]
    elif kind == 1:
        items = rng.sample(NOUNS, rng.randint(8, 14))
    else:
        items = [_made_up_word(rng, rng.randint(1, 3)) for _ in range(rng.randint(5, 9))]
    answer = " ".join(items)
    return Probe("recite", f"Repeat: {answer}", answer)


def _echo(rng: random.Random) -> Probe:
    answer = " ".join(_any_word(rng) for _ in range(rng.randint(2, 5)))
    return Probe("echo", f"Repeat: {answer}", answer)


def _any_word(rng: random.Random) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choice(rng.choice(_SCRIPTS)) for _ in range(rng.randint(1, 3)))
    if kind == 1:
        script = rng.choice(_SCRIPTS)
        return "".join(rng.choice(script) for _ in range(rng.randint(1, 4)))
    if kind == 2:
        return "".join(rng.choice(_LETTERS + _LETTERS.upper()) for _ in range(rng.randint(1, 7)))
    word = rng.choice(NOUNS) if kind == 3 else rng.choice(NAMES)
    return rng.choice((word, word.capitalize(), word.upper())) + rng.choice(("", "", ",", ".", "!", "?", ":", "'s"))


def _lookup(rng: random.Random) -> Probe:
    names = rng.sample(NAMES, rng.randint(2, 6))
    codes = [_code(rng) for _ in names]
    wanted = rng.randrange(len(names))
    facts = " ".join(f"{n} has {c}." for n, c in zip(names, codes, strict=True))
    return Probe("lookup", f"{facts} What does {names[wanted]} have?", codes[wanted])


def _arithmetic(rng: random.Random) -> Probe:
    a, b = rng.randrange(200), rng.randrange(200)
    if rng.random() < 0.5:
        return Probe("arithmetic", f"What is {a} + {b}?", str(a + b))
    a, b = max(a, b), min(a, b)
    return Probe("arithmetic", f"What is {a} - {b}?", str(a - b))


def _sorting(rng: random.Random) -> Probe:
    kind = rng.randrange(3)
    if kind == 0:
        numbers = rng.sample(range(100), rng.randint(3, 7))
        items, ordered = [str(n) for n in numbers], [str(n) for n in sorted(numbers)]
    else:
        items = rng.sample(_LETTERS, rng.randint(4, 8)) if kind == 1 else rng.sample(NOUNS, rng.randint(3, 5))
        ordered = sorted(items)
    return Probe("sorting", f"Sort: {' '.join(items)}", " ".join(ordered))


def _spelling(rng: random.Random) -> Probe:
    word = _made_up_word(rng, rng.randint(2, 4))
    return Probe("spelling", f"Spell: {word}", "-".join(word))


def _reversing(rng: random.Random) -> Probe:
    word = _made_up_word(rng, rng.randint(2, 3))
    return Probe("reversing", f"Reverse: {word}", word[::-1])


def _counting(rng: random.Random) -> Probe:
    word = _made_up_word(rng, rng.randint(2, 4))
    # A letter of the word three times in four: most letters of the alphabet would count zero.
    letter = rng.choice(word if rng.random() < 0.75 else _LETTERS)
    return Probe("counting", f"How many times is {letter} in {word}?", str(word.count(letter)))


_MAKERS: dict[str, Callable[[random.Random], Probe]] = {
    "recall": _recall,
    "recite": _recite,
    "echo": _echo,
    "lookup": _lookup,
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "spelling": _spelling,
    "reversing": _reversing,
    "counting": _counting,
}
TASKS: tuple[str, ...] = tuple(_MAKERS)


def is_held_out(prompt: str) -> bool:
    """Whether training never saw the question that `prompt` ends with, whatever filler precedes it."""
    question = prompt.rsplit(FILLER_SEPARATOR, 1)[-1]
    digest = blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def make_probe(task: str, rng: random.Random, held_out: bool = False) -> Probe:
    """Draw a probe of `task` (one of TASKS) from the training split or from the held-out split."""
    maker = _MAKERS[task]
    while True:
        probe = maker(rng)
        if is_held_out(probe.prompt) == held_out:
            return probe


def make_memory(rng: random.Random, name: str, held_out: bool = False) -> tuple[Probe, Probe]:
    """Draw two turns of one conversation: `name`'s secret is told, and any time later asked for."""
    while True:
        code = _code(rng)
        told = f"Remember that the secret of {name} is {code}."
        if is_held_out(told) == held_out:
            break
    return (
        Probe("memory", told, f"I will remember the secret of {name}."),
        Probe("memory", f"What is the secret of {name}?", code),
    )


def add_filler(probe: Probe, rng: random.Random, num_words: int) -> Probe:
    """The same question after at least `num_words` words of story: long, and in the same split."""
    filler: list[str] = []
    while sum(len(text.split()) for text in filler) < num_words:
        filler.append(make_story(rng)[1])
    prompt = " ".join(filler) + FILLER_SEPARATOR + probe.prompt
    return Probe(probe.task, prompt, probe.answer)


def is_correct(probe: Probe, text: str) -> bool:
    """Whether `text`, less white space around it, is the probe's answer."""
    return text.strip() == probe.answer


_ANIMALS = """badger bear bison camel cat crow deer dog dolphin donkey dragon falcon finch fox frog gecko goat
    hare hedgehog heron jaguar koala lark leopard lizard lobster mole monkey mouse panda parrot pelican pigeon
    rabbit raven robin salmon sparrow spider squirrel swan tiger turtle walrus wolf zebra""".split()  # noqa: SIM905
_PLACES = (
    "the old mill",
    "the dark forest",
    "the river bank",
    "the high meadow",
    "the quiet harbor",
    "the stone bridge",
    "the empty castle",
    "the apple orchard",
    "the windy hill",
    "the frozen lake",
)
_THINGS = (
    "a silver key",
    "a red kite",
    "a small lantern",
    "a wooden boat",
    "a torn map",
    "a golden bell",
    "a glass marble",
    "a warm scarf",
    "a rusty whistle",
    "a jar of honey",
)
_OPENINGS = (
    "Once upon a time, {name} the {animal} lived near {place}.",
    "Long ago, a {animal} called {name} had a house near {place}.",
    "There was once a {animal} named {name} who loved {place}.",
)
_EVENTS = (
    "One {day} morning {name} found {thing} under a tree.",
    "{name} had never seen {thing} before.",
    "It began to rain, and the path to {place2} was full of mud.",
    "On the way {name} met {friend} the {animal2}, who was looking for {thing2}.",
    '{friend} said, "I lost {thing2} near {place2}, and I cannot find it."',
    '"Let us look for it together," said {name}.',
    "They walked for {number} hours, and the sun went down behind {place2}.",
    "At night they ate bread and {fruit} soup by the fire.",
    "A {day2} wind blew, and {friend} was afraid of the dark.",
    "{name} sang a little song, and soon both of them fell asleep.",
    "In the morning they saw something bright near {place2}.",
    "It was {thing2}, and it was not broken at all.",
    "{friend} was so happy that the {animal2} danced {number} times around a tree.",
    '"Thank you," said {friend}, "now you must come to my house."',
)
_ENDINGS = (
    "So {name} and {friend} became friends, and they still are.",
    "From that day on {name} went to {place2} every summer.",
    "And {name} the {animal} went home and slept for {number} days.",
)
_STORY_PROMPTS = (
    "Tell me a story about {name} the {animal}.",
    "Write a story about a {animal} named {name}.",
    "Tell me a story about {name} and {friend}.",
    "Tell me a story.",
)


def make_story(rng: random.Random) -> tuple[str, str]:
    """Draw a request for a story and one of the many stories that answer it."""
    name, friend = rng.sample(NAMES, 2)
    if rng.random() < 0.3:
        name = _made_up_word(rng, rng.randint(1, 3)).capitalize()
    animal, animal2 = rng.sample(_ANIMALS, 2)
    place, place2 = rng.sample(_PLACES, 2)
    thing, thing2 = rng.sample(_THINGS, 2)
    day, day2 = rng.sample(("cold", "bright", "windy", "quiet", "strange"), 2)
    words = {
        "name": name,
        "friend": friend,
        "animal": animal,
        "animal2": animal2,
        "place": place,
        "place2": place2,
        "thing": thing,
        "thing2": thing2,
        "day": day,
        "day2": day2,
        "number": rng.choice(("two", "three", "seven", "nine")),
        "fruit": rng.choice(("apple", "pumpkin", "carrot", "onion")),
    }
    chosen = sorted(rng.sample(range(len(_EVENTS)), rng.randint(6, 12)))
    sentences = [rng.choice(_OPENINGS), *(_EVENTS[i] for i in chosen), rng.choice(_ENDINGS)]
    prompt = rng.choice(_STORY_PROMPTS).format(**words)
    return prompt, " ".join(sentences).format(**words)
