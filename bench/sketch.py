"""Outputs in a few numbers: what two workers of a gate can compare although tensors never cross a pipe.

A sketch holds seeded random projections of the flattened output. For unit normal directions the mean square of the
projected difference of two outputs is the square of its norm (Johnson & Lindenstrauss), so few suffice to tell rounding
from another result.
"""

from __future__ import annotations

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
    """Return size, dtype, norm and projections of an output of tensors, arrays and numbers; None where there is
    none."""
    import numpy as np

    parts = list(_arrays(output))
    if not parts:
        return None
    dtype = max((name for name, _ in parts), key=lambda name: BOUNDS.get(name, 0.0))
    flat = np.concatenate([values.ravel() for _, values in parts])
    directions = np.random.default_rng(0)
    projections = [float(directions.standard_normal(len(flat)) @ flat) for _ in range(PROJECTIONS)]
    shapes = [list(values.shape) for _, values in parts]
    return {"shapes": shapes, "dtype": dtype, "norm": float(np.linalg.norm(flat)), "projections": projections}


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
    """Return how two sketches differ beyond rounding, in a few words; an empty string where they agree."""
    if base["shapes"] != candidate["shapes"]:
        return f"shapes {base['shapes']} and {candidate['shapes']}"
    if not (math.isfinite(base["norm"]) and math.isfinite(candidate["norm"])):
        return "an output that is not finite"
    bound = CHANCE * max(BOUNDS.get(base["dtype"], 0.0), BOUNDS.get(candidate["dtype"], 0.0))
    error = _distance(base["projections"], candidate["projections"]) / (base["norm"] or 1.0)
    return f"a difference of {error:.1e} of the norm ({bound:g} is allowed)" if error > bound else ""


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))
