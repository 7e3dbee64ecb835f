"""Minimal pairs of English grammar: two sentences that differ in what makes one of them wrong.

In the manner of BLiMP (Warstadt et al., arXiv 1912.00582): templates filled with words, and a model is right where it
finds the grammatical sentence likelier. Templates and words are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from .items import Item, chance_of, different, two_options

PEOPLE = {
    "boy": "boys", "girl": "girls", "teacher": "teachers", "doctor": "doctors", "farmer": "farmers",
    "woman": "women", "man": "men", "child": "children", "student": "students", "king": "kings",
}  # fmt: skip
OBJECTS = {
    "table": "tables", "car": "cars", "house": "houses", "picture": "pictures", "door": "doors",
    "letter": "letters", "tree": "trees", "bottle": "bottles", "window": "windows", "shirt": "shirts",
}  # fmt: skip
PLACES = (
    "in the garden", "near the river", "behind the school", "at the station", "on the hill", "in the kitchen",
)  # fmt: skip
STATES = ("old", "new", "small", "beautiful", "strange", "expensive")
VERBS = {"write": ("wrote", "written"), "eat": ("ate", "eaten"), "break": ("broke", "broken"),
         "take": ("took", "taken"), "see": ("saw", "seen"), "give": ("gave", "given"),
         "steal": ("stole", "stolen"), "choose": ("chose", "chosen")}  # fmt: skip
HURT = ("hurt", "saw", "blamed", "trusted", "helped", "described")
THEMSELVES = {"boy": "himself", "king": "himself", "man": "himself", "girl": "herself", "woman": "herself"}

Pair = tuple[str, str]
"""The sentence that is right, and the one that is not."""


def agreement(rng: random.Random) -> Pair:
    """A verb agrees with its subject, not with the noun that stands between."""
    (one, many), (near, nears) = rng.sample(sorted(OBJECTS.items()), 2)
    state, plural = rng.choice(STATES), rng.randrange(2)
    subject, between = (many, near) if plural else (one, nears)
    right, wrong = ("are", "is") if plural else ("is", "are")
    start = f"The {subject} near the {between}"
    return f"{start} {right} {state}.", f"{start} {wrong} {state}."


def simple_agreement(rng: random.Random) -> Pair:
    """A verb agrees with the subject beside it."""
    (one, many), place = rng.choice(sorted(PEOPLE.items())), rng.choice(PLACES)
    if rng.randrange(2):
        return f"The {many} were {place}.", f"The {many} was {place}."
    return f"The {one} was {place}.", f"The {one} were {place}."


def determiner(rng: random.Random) -> Pair:
    """A demonstrative agrees with its noun."""
    person, (one, many) = rng.choice(sorted(PEOPLE)), rng.choice(sorted(OBJECTS.items()))
    singular, plural = rng.choice((("this", "these"), ("that", "those")))
    bought = rng.choice(("bought", "found", "sold", "painted"))
    if rng.randrange(2):
        return f"The {person} {bought} {plural} {many}.", f"The {person} {bought} {singular} {many}."
    return f"The {person} {bought} {singular} {one}.", f"The {person} {bought} {plural} {one}."


def reflexive(rng: random.Random) -> Pair:
    """A reflexive pronoun agrees with the subject."""
    person, verb = rng.choice(sorted(THEMSELVES)), rng.choice(HURT)
    if rng.randrange(2):
        many = PEOPLE[person]
        return f"The {many} {verb} themselves.", f"The {many} {verb} {THEMSELVES[person]}."
    other = "herself" if THEMSELVES[person] == "himself" else "himself"
    return f"The {person} {verb} {THEMSELVES[person]}.", f"The {person} {verb} {other}."


def participle(rng: random.Random) -> Pair:
    """An irregular verb has another form after an auxiliary than without one."""
    person, thing = rng.choice(sorted(PEOPLE)), rng.choice(sorted(OBJECTS))
    past, after = VERBS[rng.choice(sorted(VERBS))]
    if rng.randrange(2):
        return f"The {person} has {after} the {thing}.", f"The {person} has {past} the {thing}."
    return f"Yesterday the {person} {past} the {thing}.", f"Yesterday the {person} {after} the {thing}."


def modal(rng: random.Random) -> Pair:
    """A modal verb takes the bare verb."""
    person, thing, verb = rng.choice(sorted(PEOPLE)), rng.choice(sorted(OBJECTS)), rng.choice(sorted(VERBS))
    can = rng.choice(("can", "will", "must", "should"))
    return f"The {person} {can} {verb} the {thing}.", f"The {person} {can} {verb}s the {thing}."


def question(rng: random.Random) -> Pair:
    """A question has its auxiliary before the subject."""
    person, verb = rng.choice(sorted(PEOPLE)), rng.choice(sorted(VERBS))
    word = rng.choice(("What", "When", "Why", "Where"))
    return f"{word} did the {person} {verb} it?", f"{word} the {person} did {verb} it?"


def polarity(rng: random.Random) -> Pair:
    """`ever` wants a negation before it."""
    participles, thing = VERBS[rng.choice(sorted(VERBS))], rng.choice(sorted(OBJECTS))
    nobody, somebody = rng.choice((("Nobody", "Somebody"), ("No one", "Someone")))
    return f"{nobody} has ever {participles[1]} the {thing}.", f"{somebody} has ever {participles[1]} the {thing}."


PARADIGMS: tuple[Callable[[random.Random], Pair], ...] = (
    agreement, simple_agreement, determiner, reflexive, participle, modal, question, polarity,
)  # fmt: skip


def grammar(count: int, seed: int) -> list[Item]:
    """Pairs of all PARADIGMS in equal parts, in random order; ``context`` is empty, the sentences are the options."""
    rng = chance_of(seed, "grammar")
    found: list[Item] = []
    for number, paradigm in enumerate(PARADIGMS):
        share = count // len(PARADIGMS) + (number < count % len(PARADIGMS))
        found += different(share, partial(_item, paradigm, rng))
    rng.shuffle(found)
    return found


def _item(paradigm: Callable[[random.Random], Pair], rng: random.Random) -> Item:
    right, wrong = paradigm(rng)
    return two_options("", right, wrong, rng)
