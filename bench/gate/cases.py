"""Which cases a gate has: those of a plan, the same on two backends, or callables of the user's own sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...contracts import Case, Choice, Evidence, MoebenchError, Planned, Registry
from ...suites.base import SuiteConfig
from ..config import RunConfig
from ..plan import label
from .config import PairedCase

MOST_TOGETHER = 24
"""Cases in one ring at most: each process pair prepares all of them, and one that dies makes the others begin anew."""

NONE = Choice("none")


@dataclass(frozen=True)
class Cases:
    """What a gate measures: batches whose cases share their workers, and what will not run, with the reason.

    ``once`` are evaluations, which have no times: each side runs them once, and their items are judged in pairs.
    """

    batches: tuple[tuple[PairedCase, ...], ...]
    refused: tuple[tuple[PairedCase, str], ...] = ()
    once: tuple[PairedCase, ...] = ()

    @property
    def count(self) -> int:
        """Number of cases that will run."""
        return sum(map(len, self.batches)) + len(self.once)


def target_cases(targets: Sequence[str], device: str = "cpu") -> Cases:
    """Return one case for each ``package.module:make_trial`` of the sides' own sources."""
    cases = []
    for target in targets:
        if ":" not in target:
            raise MoebenchError(f"--target {target} names no object; write it as package.module:make_trial.")
        cases.append(target_case(target, device=device))
    paired = tuple(PairedCase(target, case, case) for target, case in zip(targets, cases, strict=True))
    return Cases(in_batches(paired))


def target_case(target: str, arguments: Sequence[Any] = (), device: str = "cpu") -> Case:
    """Return the case of ``package.module:make_trial``, called with ``arguments`` (plain JSON values)."""
    return Case(
        suite="target",
        suite_version="1",
        protocol="timed",
        model=NONE,
        layers=(),
        structure=NONE,
        routing=NONE,
        quantization=NONE,
        sparsity=NONE,
        backend=NONE,
        traffic=NONE,
        tokens=0,
        dtype="float32",
        pass_="forward",
        boundary="topk",
        threads=1,
        device=device,
        residency="warm",
        evidence=Evidence.MEASURED_CPU if device == "cpu" else Evidence.MEASURED_GPU,
        seed=0,
        weights_sha256="",
        workload={"target": target, "arguments": list(arguments)},
    )


def planned_cases(config: RunConfig, registry: Registry, memory_bytes: float) -> Cases:
    """Return the cases of a configuration; three workers hold each timed one at once."""
    runnable, refused, once = [], [], []
    for planned in _all(config.blocks, registry):
        case = planned.case
        paired = PairedCase(_label(case, registry), case, case)
        if planned.refusal is not None:
            refused.append((paired, planned.refusal))
        elif case.protocol == "once":
            once.append(paired)
        else:
            runnable.append((paired, planned.bytes_alone))
    return Cases(_in_batches(runnable, memory_bytes / 3), tuple(refused), tuple(once))


def backend_cases(config: RunConfig, registry: Registry, memory_bytes: float, base: str, candidate: str) -> Cases:
    """Return pairs of cases that differ in their backend alone."""
    found: dict[str, dict[str, Planned]] = {}
    for planned in _all(config.blocks, registry):
        key = replace(planned.case, backend=NONE, execution=type(planned.case.execution)(), environment={}).case_key
        sides = found.setdefault(key, {})
        if planned.case.backend.name in sides:
            raise MoebenchError(f"backend {planned.case.backend.name} has several settings here; name one of them.")
        sides[planned.case.backend.name] = planned
    runnable, refused, once = [], [], []
    for pair in found.values():
        if base not in pair or candidate not in pair:
            continue
        both = pair[base], pair[candidate]
        name = _label(replace(both[0].case, backend=NONE), registry)
        paired = PairedCase(f"{name} {candidate}/{base}", both[0].case, both[1].case)
        reason = next((one.refusal for one in both if one.refusal is not None), None)
        if reason is not None:
            refused.append((paired, reason))
        elif paired.base.protocol == "once":
            once.append(paired)
        else:
            runnable.append((paired, sum(one.bytes_alone for one in both)))
    return Cases(_in_batches(runnable, memory_bytes / 3), tuple(refused), tuple(once))


def _all(blocks: Sequence[SuiteConfig], registry: Registry) -> Iterator[Planned]:
    seen: set[str] = set()
    for block in blocks:
        for planned in registry.get("suite", block.suite).create().cases(block, registry):
            if planned.case.case_key not in seen:
                seen.add(planned.case.case_key)
                yield planned


def in_batches(cases: Sequence[PairedCase]) -> tuple[tuple[PairedCase, ...], ...]:
    """Split cases whose memory is not known into batches, in their order."""
    return _in_batches([(one, 0.0) for one in cases], float("inf"))


def _in_batches(cases: Sequence[tuple[PairedCase, float]], limit: float) -> tuple[tuple[PairedCase, ...], ...]:
    """Split cases into batches of equal threads that memory and patience can hold together, in their order."""
    batches: list[tuple[list[PairedCase], float]] = []
    for paired, size in cases:
        threads = paired.base.threads
        last = next((i for i in reversed(range(len(batches))) if batches[i][0][0].base.threads == threads), None)
        if last is None or len(batches[last][0]) >= MOST_TOGETHER or batches[last][1] + size > limit:
            batches.append(([paired], size))
        else:
            batches[last] = ([*batches[last][0], paired], batches[last][1] + size)
    return tuple(tuple(batch) for batch, _ in batches)


def _label(case: Case, registry: Registry) -> str:
    layers = f" layer {','.join(map(str, case.layers))}" if case.layers else ""
    where = f"{case.suite} {case.model.name}{layers} T={case.tokens} {case.dtype}"
    extra = [case.traffic.name] if case.traffic.name not in ("gaussian", "none") else []
    extra += [case.pass_] if case.pass_ != "forward" else []
    return f"{where} {' '.join([*extra, label(case, registry)])}"
