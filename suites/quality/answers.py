"""Generated answers against right ones: exact match and the F1 of common words, by the rules of SQuAD.

Rajpurkar et al., arXiv 1606.05250: answers are compared in lower case, without punctuation, articles and superfluous
spaces; of several right answers the one that agrees best counts. lm-eval loads this file beside the task that it
judges, so it imports the standard library alone.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Return an answer as it is compared."""
    words = ARTICLES.sub(" ", answer.lower().translate(NO_PUNCTUATION))
    return " ".join(words.split())


def exact_match(answer: str, right: Iterable[str]) -> float:
    """Return 1 where ``answer`` is one of the right ones, else 0."""
    return float(normalised(answer) in {normalised(one) for one in right})


def token_f1(answer: str, right: Iterable[str]) -> float:
    """Return the largest F1 of the words in common with one of the right answers; nothing agrees with nothing."""
    return max((_f1(normalised(answer).split(), normalised(one).split()) for one in right), default=0.0)


def judged(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return both figures of what a model wrote to ``item``, by name; lm-eval calls it."""
    return {"exact_match": exact_match(results[0], item["answers"]), "token_f1": token_f1(results[0], item["answers"])}


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))
