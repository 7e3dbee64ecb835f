"""What ``moebench trace`` prints of a trace."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from ..backends.offload.access import Access, slots_of
from ..suites.trace import Trace, sha256_of_file
from ..suites.traces.figures import guesses, hit_rates, popularity, reuse
from ..suites.traces.files import TraceFile, read_trace
from .printable import printable_line

LABEL = 32
"""Characters before what is said."""


def inspection(path: str, capacities: Sequence[float]) -> str:
    """Return the figures of a trace, line by line, and how to replay it.

    ``capacities`` are shares of all experts; a cache has as many slots, rounded down.
    """
    sha256 = sha256_of_file(path)
    file = read_trace(path, sha256)
    accesses = file.accesses()
    lines = [*_content(file, accesses), *_figures(file, accesses), *_hits(file, accesses, capacities)]
    told = [f"{label:{LABEL}s}{printable_line(text)}" for label, text in [("trace", path), *lines, ("sha256", sha256)]]
    return "\n".join([*told, "replay:", f"  {replay_line(file.trace, path, sha256)}"])


def _content(file: TraceFile, accesses: Sequence[Access]) -> Iterator[tuple[str, str]]:
    if file.facts:
        yield "made", _made(file.facts)
    sizes = {}
    for (step, _), entries in file.trace.by_place.items():
        sizes[step] = entries.tokens
    first, later = sizes[0], {size for step, size in sizes.items() if step}
    beyond = f", then {_span(later)}" if later - {first} else ""
    yield "steps", f"{file.trace.steps} of {first} {_plural('token', first)}{beyond}"
    layers = file.layout.layers
    per_token = {int(entries.most_k) for entries in file.trace.by_place.values()}
    yield (
        "layers",
        f"{len(layers)} ({_ids(layers)}) of {file.layout.experts} experts, at most {max(per_token)} for a token",
    )
    distinct = sorted(len(access.experts) for access in accesses)
    mean = sum(distinct) / len(distinct)
    yield "experts of a layer at a step", f"mean {mean:.2f}, median {distinct[len(distinct) // 2]}, most {distinct[-1]}"


def _figures(file: TraceFile, accesses: Sequence[Access]) -> Iterator[tuple[str, str]]:
    spread, again, hints = popularity(accesses, file.layout), reuse(accesses), guesses(accesses)
    yield "requests", f"{spread.requests} for {spread.asked} of {file.layout.size} experts"
    yield "the busiest tenth of experts", f"{spread.busiest_share:.1%} of requests"
    yield "entropy of a layer's requests", f"{spread.entropy:.3f} of that of equal load"
    if again.kept is not None:
        yield "kept from the step before", f"{again.kept:.1%} of a layer's experts"
    yield "asked for the first time", f"{again.first:.1%} of requests"
    if again.distances:
        told = ", ".join(f"p{round(100 * q)} {again.quantile(q)}" for q in (0.1, 0.5, 0.9, 0.99))
        yield "experts between two requests", told
    if hints is not None:
        yield "hints", f"recall {hints.recall:.1%}, precision {hints.precision:.1%} over {hints.accesses} accesses"


def _hits(file: TraceFile, accesses: Sequence[Access], capacities: Sequence[float]) -> Iterator[tuple[str, str]]:
    for capacity in capacities:
        found = hit_rates(accesses, file.layout, slots_of(capacity, file.layout.size))
        label = f"hits at {capacity:.4g} ({found.slots} experts)"
        yield label, f"LRU {found.lru:.1%}, Belady {found.belady:.1%}"


def _made(facts: dict[str, Any]) -> str:
    """Return what the file's facts say of how it was made."""
    model = facts.get("model")
    if facts.get("made") != "recorded" or not isinstance(model, dict):
        parameters = facts.get("parameters")
        given = (
            " ".join(f"{name}={value}" for name, value in parameters.items()) if isinstance(parameters, dict) else ""
        )
        return f"{facts.get('made', 'unknown')} {given}".rstrip()
    named = [f"{facts[axis]['name']}" for axis in ("structure", "routing", "quantization") if _changes(facts, axis)]
    how = "generating" if facts.get("mode") == "greedy" else "reading a text"
    return f"recorded from {model.get('name', 'unknown')}, {how}" + (f" ({', '.join(named)})" if named else "")


def _changes(facts: dict[str, Any], axis: str) -> bool:
    choice = facts.get(axis)
    return isinstance(choice, dict) and choice.get("name", "none") not in ("none", "topk")


def _span(sizes: set[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{most} {_plural('token', most)}" if least == most else f"{least} to {most} tokens"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def _ids(layers: Sequence[int]) -> str:
    """Return the layers as a range where they are one."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def replay_line(trace: Trace, path: str, sha256: str) -> str:
    """Return the command that forces the trace onto a layer: as it is where all steps have equally many tokens."""
    sizes = {entries.tokens for entries in trace.by_place.values()}
    most_k = max(entries.most_k for entries in trace.by_place.values())
    settings = {
        "path": path,
        "sha256": sha256,
        "layer": trace.layers[0],
        **({} if len(sizes) == 1 else {"fit": "projected"}),
    }
    experts = max(entries.most_expert for entries in trace.by_place.values()) + 1
    return shlex.join(
        [
            *("moebench", "run", "suite=throughput", "model=small", f"model.experts={experts}"),
            *(f"params.routing.topk.k={most_k}", f"axes.tokens={min(sizes)}", "axes.traffic=replay"),
            *(f"params.traffic.replay.{name}={value}" for name, value in settings.items()),
        ]
    )
