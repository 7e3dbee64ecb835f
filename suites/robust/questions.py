"""Extractive questions made from templates: known ones to learn from, others and other names to be judged on.

A context is one sentence per fact about each of its people, in any order; a question asks for one fact of one person,
and the answer is a span of the context. Augmentation is EDA (arXiv 1901.11196): words swapped, left out, repeated or
replaced by one of the same meaning, each with a small probability, never within an answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FACTS: Mapping[str, Sequence[str]] = {
    "home": ("old bridge", "green hill", "north port", "lake side", "stone mill", "white cliff"),
    "work": ("young baker", "night nurse", "ship pilot", "school cook", "wood carver", "road builder"),
    "food": ("red apples", "fresh bread", "black olives", "goat cheese", "sweet corn", "dried fish"),
}
"""What people have, by kind: values of two words."""

KNOWN: Mapping[str, tuple[str, ...]] = {
    "home": ("{who} lives at {what} .", "{who} has a house at {what} ."),
    "work": ("{who} works as {what} .", "{who} has a job as {what} ."),
    "food": ("{who} likes to eat {what} .", "{who} buys much {what} ."),
}
UNSEEN: Mapping[str, tuple[str, ...]] = {
    "home": ("at {what} dwells {who} .", "{who} rents a small house , and it is at {what} ."),
    "work": ("by day {who} is employed as {what} .", "as {what} {who} works the most ."),
    "food": ("{what} {who} enjoys to eat .", "of all things {who} likes {what} ."),
}
"""Sentences of a fact; the unseen ones turn its order around and use other words of the same meaning."""

QUESTIONS: Mapping[str, str] = {
    "home": "where does {who} live ?",
    "work": "what does {who} work as ?",
    "food": "which food does {who} like ?",
}

SYNONYMS: Sequence[frozenset[str]] = (
    frozenset({"lives", "resides", "stays"}),
    frozenset({"works", "toils", "serves"}),
    frozenset({"likes", "loves", "prefers"}),
    frozenset({"buys", "gets"}),
    frozenset({"house", "home"}),
    frozenset({"much", "plenty"}),
)
"""Words that augmentation takes for each other; none that only unseen sentences have, or it would teach these."""

NAMES = tuple(f"name{number}" for number in range(60))
NEW_NAMES = tuple(f"new{number}" for number in range(20))
"""Names to learn from, and names that are seen in judgement alone."""

PEOPLE = 3
CHANCE = 0.1
"""Probability of each change of EDA at a word."""


class Example(NamedTuple):
    """Words of question and context, and where the answer begins and ends (inclusive) among them."""

    words: tuple[str, ...]
    start: int
    end: int

    @property
    def answer(self) -> str:
        """The words of the answer."""
        return " ".join(self.words[self.start : self.end + 1])


def example(rng: random.Random, templates: Mapping[str, Sequence[str]], names: Sequence[str]) -> Example:
    """Return a question about one of ``PEOPLE`` people of ``names``, told by ``templates``."""
    people = rng.sample(names, PEOPLE)
    values = {kind: rng.sample(of, PEOPLE) for kind, of in FACTS.items()}
    asked, kind = rng.randrange(PEOPLE), rng.choice(list(FACTS))
    facts = [(place, one) for place in range(PEOPLE) for one in FACTS]
    rng.shuffle(facts)
    words = QUESTIONS[kind].format(who=people[asked]).split()
    start = 0
    for place, one in facts:
        before, after = rng.choice(templates[one]).format(who=people[place], what="\n").split("\n")
        if (place, one) == (asked, kind):
            start = len(words) + len(before.split())
        words += [*before.split(), *values[one][place].split(), *after.split()]
    return Example(tuple(words), start, start + len(values[kind][asked].split()) - 1)


def augmented(rng: random.Random, one: Example) -> Example:
    """Return the example with words of its context changed; its question and its answer stay."""
    context = one.words.index("?") + 1
    words = [(word, one.start <= place <= one.end) for place, word in enumerate(one.words)]
    changed = words[:context]
    for word, answers in words[context:]:
        if answers:
            changed.append((word, True))
        elif rng.random() >= CHANCE:  # else it is left out
            same = _replaced(rng, word)
            changed += [(same, False)] * (2 if rng.random() < CHANCE else 1)
    for place in range(context, len(changed) - 1):
        pair = changed[place : place + 2]
        if rng.random() < CHANCE and not any(answers for _, answers in pair):
            changed[place : place + 2] = pair[::-1]
    span = [place for place, (_, answers) in enumerate(changed) if answers]
    return Example(tuple(word for word, _ in changed), span[0], span[-1])


def _replaced(rng: random.Random, word: str) -> str:
    """Return a word of the same meaning now and then."""
    same = next((sorted(group) for group in SYNONYMS if word in group), [word])
    return rng.choice(same) if rng.random() < CHANCE * len(same) else word


def vocabulary() -> dict[str, int]:
    """Return every word that may occur, numbered; 0 is for what fills a batch up."""
    templates = [text for told in (KNOWN, UNSEEN) for texts in told.values() for text in texts]
    texts = [*templates, *QUESTIONS.values(), *(value for values in FACTS.values() for value in values)]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    words |= {word for group in SYNONYMS for word in group}
    return {word: number for number, word in enumerate([*sorted(words), *NAMES, *NEW_NAMES], start=1)}
