"""Outputs in a few numbers: what two workers of a gate can compare although tensors never cross a pipe.

A sketch holds seeded random projections of every tensor, array and number of the output. For unit normal directions
the mean square of the projected difference of two outputs is the square of its norm (Johnson & Lindenstrauss), so few
suffice to tell rounding from another result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PROJECTIONS = 16

BOUNDS = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest difference in the norm, relative to the norm, that counts as rounding, by dtype; else the outputs are
equal."""

CHANCE = 3.0
"""The norm estimated from 16 projections exceeds this many times the true one with a chance below 1e-15."""


def sketch(output: Any) -> dict[str, Any] | None:
    """Return ``{"parts": [...]}`` for an output of tensors, arrays and numbers; None where there is none of them.

    A part has shape, dtype, norm and projections of what is finite, and a hash of where and what the rest is.
    """
    parts = [_part(dtype, values) for dtype, values in _arrays(output)]
    return {"parts": parts} if parts else None


def _part(dtype: str, values: Any) -> dict[str, Any]:
    import numpy as np

    flat = values.ravel()
    finite = np.isfinite(flat)
    odd = np.where(np.isnan(flat), 2, np.sign(flat)).astype(np.int8) * ~finite
    flat = np.where(finite, flat, 0.0)
    directions = np.random.default_rng(0)
    return {
        "shape": list(values.shape),
        "dtype": dtype,
        "norm": float(np.linalg.norm(flat)),
        "projections": [float(directions.standard_normal(len(flat)) @ flat) for _ in range(PROJECTIONS)],
        "odd": "" if finite.all() else hashlib.sha256(odd.tobytes()).hexdigest(),
    }


def _arrays(output: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name of the dtype, float64 array) of every tensor, array and number in the output."""
    import numpy as np

    if output is None or isinstance(output, (str, bytes)):
        return
    if isinstance(output, Mapping):
        output = [output[key] for key in sorted(output, key=str)]
    if isinstance(output, (list, tuple)):
        for item in output:
            yield from _arrays(item)
        return
    if hasattr(output, "detach"):
        name = str(output.dtype).removeprefix("torch.")
        yield name, output.detach().cpu().double().numpy()
        return
    try:
        array = np.asarray(output)
        yield str(array.dtype), array.astype(np.float64)
    except (TypeError, ValueError):
        return


def difference(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    """Return how two sketches differ beyond rounding, in a few words; an empty string where they agree.

    Integers and booleans must be equal. Workers of older revisions sketch in a way that bears no comparison: theirs
    count as agreeing, and their own oracle has spoken.
    """
    if "parts" not in base or "parts" not in candidate:
        return ""
    shapes = [[part["shape"] for part in one["parts"]] for one in (base, candidate)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    return next(filter(None, map(_part_difference, base["parts"], candidate["parts"])), "")


def _part_difference(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    if base["odd"] != candidate["odd"]:
        return "numbers that are not finite in different places"
    bound = CHANCE * max(BOUNDS.get(base["dtype"], 0.0), BOUNDS.get(candidate["dtype"], 0.0))
    error = _distance(base["projections"], candidate["projections"]) / (base["norm"] or 1.0)
    return f"a difference of {error:.1e} of the norm ({bound:g} is allowed)" if error > bound else ""


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))
