"""Tasks whose answer stands in the context or follows from it: arithmetic, copying, induction, recall, questions.

Both options of an item are of one kind and occur equally often, so that a model that reads nothing gets half of them;
the answer to a question is the model's to write.
"""

from __future__ import annotations

import random

from .items import Item, chance_of, different, two_options


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _words(
    "apple book chair dog engine flower garden horse island jacket kitchen ladder mountain needle ocean paper queen "
    "river silver table uncle village window yellow bridge candle desert eagle forest guitar hammer iron lemon market"
)

NAMES = _words("Anna Ben Clara David Emma Frank Grace Henry Jack Kate Laura Mark Nora Oscar Paul Rose Sam Tom")

THINGS = _words("ball bell book bowl box coat cup hat key knife lamp map pen ring rope shoe spoon watch")


def arithmetic(count: int, seed: int) -> list[Item]:
    """Sums and differences of small numbers after two examples; the wrong answer has as many digits."""
    rng = chance_of(seed, "arithmetic")
    return different(count, lambda: _sum(rng))


def _sum(rng: random.Random) -> Item | None:
    examples = [_equation(rng) for _ in range(2)]
    question, answer = _equation(rng)
    wrong = answer + rng.choice((-3, -2, -1, 1, 2, 3))
    if wrong < 0 or len(str(wrong)) != len(str(answer)) or any(question == asked for asked, _ in examples):
        return None
    shown = [f"{asked} {given}" for asked, given in examples]
    return two_options("\n".join([*shown, question]), f" {answer}", f" {wrong}", rng)


def _equation(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(1, 20), rng.randint(1, 9)
    if rng.randrange(2) and a >= b:
        return f"{a} - {b} =", a - b
    return f"{a} + {b} =", a + b


def copying(count: int, seed: int) -> list[Item]:
    """A list of six words and its beginning again: the next word, against another one of the list."""
    rng = chance_of(seed, "copying")

    def draw() -> Item:
        words = rng.sample(WORDS, 6)
        at = rng.randrange(2, 6)
        wrong = rng.choice([word for place, word in enumerate(words) if place > 0 and place not in (at, at - 1)])
        return two_options(" ".join([*words, *words[:at]]), f" {words[at]}", f" {wrong}", rng)

    return different(count, draw)


def induction(count: int, seed: int) -> list[Item]:
    """Ten words, and one of them again: what followed it, against what followed another one."""
    rng = chance_of(seed, "induction")

    def draw() -> Item:
        words = rng.sample(WORDS, 10)
        at, other = rng.sample(range(1, 9), 2)
        return two_options(" ".join([*words, words[at]]), f" {words[at + 1]}", f" {_after(words, at, other)}", rng)

    return different(count, draw)


def _after(words: list[str], at: int, other: int) -> str:
    """Return what follows ``other``, or precedes it where that is the word that is asked about."""
    return words[other + 1] if other + 1 != at else words[other]


def _possessions(rng: random.Random) -> tuple[str, list[str], list[str], list[int]]:
    """Return three people with a thing each as told, their names, their things, and two of the three by number."""
    names, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    told = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    return told, names, things, rng.sample(range(3), 2)


def recall(count: int, seed: int) -> list[Item]:
    """Three people with a thing each: whose is which, asked of any of them, against the thing of another."""
    rng = chance_of(seed, "recall")

    def draw() -> Item:
        told, names, things, (asked, other) = _possessions(rng)
        return two_options(f"{told} {names[asked]} has the", f" {things[asked]}", f" {things[other]}", rng)

    return different(count, draw)


def questions(count: int, seed: int) -> list[Item]:
    """Three people with a thing each, an answered question about one of them, and a question about another."""
    rng = chance_of(seed, "questions")

    def draw() -> Item:
        told, names, things, (shown, asked) = _possessions(rng)
        example = f"Question: What does {names[shown]} have?\nAnswer: the {things[shown]}"
        question = f"Question: What does {names[asked]} have?\nAnswer:"
        return {"context": f"{told}\n{example}\n{question}", "answers": [f"the {things[asked]}"]}

    return different(count, draw)
