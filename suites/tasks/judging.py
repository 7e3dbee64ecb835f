"""What a task of lm-eval says of its answers: every item's value, and the task's with an interval."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from ...contracts import Item, Metric
from ..quality.bootstrap import LEVEL

RESAMPLES = 1000

LEAST_ITEMS = 10
"""Fewer items give a value without bounds."""

NO_FILTER = "none"

ITEMWISE = ("mean", "nanmean", "bits_per_byte", "perplexity", "weighted_perplexity")
"""lm-eval's aggregations that say something of one item. What others make of one (matthews_corrcoef: 0, f1_score: 1 for
a true positive alone) is no part of the task's figure."""


def judge(name: str, task: Any, seed: int) -> tuple[list[Item], list[Metric]]:
    """Return the items and metrics of a task whose requests have been answered.

    Items are called by the number of their document, metrics ``<task>.<metric>``; a filter other than lm-eval's
    ``none`` stands behind a comma, as lm-eval writes it.
    """
    task.apply_filters()
    requests: dict[int, list[Any]] = defaultdict(list)
    for request in task.instances:
        requests[request.doc_id].append(request)
    values: dict[str, dict[int, Any]] = defaultdict(dict)
    documents = {doc_id: sorted(own, key=lambda request: request.idx) for doc_id, own in requests.items()}
    for kept in task.instances[0].filtered_resps:
        for doc_id, own in documents.items():
            found = task.process_results(own[0].doc, [request.filtered_resps[kept] for request in own])
            for metric, value in found.items():
                values[metric if kept == NO_FILTER else f"{metric},{kept}"][doc_id] = value
    items: list[Item] = []
    metrics = _chance(name, task, documents)
    for metric, by_document in values.items():
        aggregate = task.aggregation()[metric.partition(",")[0]]
        items += [Item(name, str(doc_id), metric, _alone(value, aggregate)) for doc_id, value in by_document.items()]
        metrics.append(_with_interval(f"{name}.{metric}", list(by_document.values()), aggregate, seed))
    return items, metrics


def _chance(name: str, task: Any, documents: dict[int, list[Any]]) -> list[Metric]:
    """Return the share of right answers of one that guesses, for tasks with options."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return []
    shares = [1 / len(task.doc_to_choice(own[0].doc)) for own in documents.values()]
    return [Metric(f"{name}.chance", math.fsum(shares) / len(shares), "1", n=len(shares))]


def _alone(value: Any, aggregate: Callable[[Sequence[Any]], float]) -> float | None:
    """Return the value of one item: what the task makes of it alone; None where one item has none."""
    if getattr(aggregate, "__name__", "") not in ITEMWISE:
        return None
    try:
        return float(aggregate([value]))
    except (ArithmeticError, TypeError, ValueError):
        return None


def _with_interval(name: str, values: list[Any], aggregate: Callable[[Sequence[Any]], float], seed: int) -> Metric:
    """Return the aggregate over all items with the bootstrap interval over them."""
    unit = "bit/byte" if name.endswith(".bits_per_byte") else "1"
    value = float(aggregate(values))
    if len(values) < LEAST_ITEMS:
        return Metric(name, value, unit, n=len(values))
    rng = random.Random(seed)
    drawn = sorted(float(aggregate(rng.choices(values, k=len(values)))) for _ in range(RESAMPLES))
    cut = int(RESAMPLES * (1 - LEVEL) / 2)
    return Metric(name, value, unit, drawn[cut], drawn[-1 - cut], len(values))
