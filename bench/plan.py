"""The plan of a run: its cases in groups, what will not run and why, an estimate, and the hash that a resume needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..contracts import Case, Evidence, MoebenchError, Planned, Registry, make_key
from ..suites.device import DEVICES, device_refusal
from .config import EngineConfig, RunConfig, choice_label

SPAWN_SECONDS = 6.0
PREPARE_SECONDS = 1.0
"""What a worker's start and a trial's preparation take at the least, for the estimate."""


@dataclass(frozen=True)
class Group:
    """Cases that are measured together, and those of the same kind that will not run.

    ``name`` is the group's key, with a number where a group is split for memory; every piece of a split group repeats
    its first case, the anchor, whose row is that of piece 0.
    """

    name: str
    cases: tuple[Case, ...]
    refused: tuple[Planned, ...] = ()
    piece: int = 0

    @property
    def once(self) -> bool:
        """Whether its cases run once, without clocks."""
        return any(case.protocol == "once" for case in self.cases)


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do; ``seconds`` is roughly how long each case of protocol ``once`` takes."""

    groups: tuple[Group, ...]
    engine: EngineConfig
    seed: int
    config: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """Every case that will run."""
        return [case for group in self.groups for case in group.cases]

    @property
    def refused(self) -> list[Planned]:
        """Every case that will not run, with its reason."""
        return [planned for group in self.groups for planned in group.refused]

    def estimate_seconds(self) -> float:
        """Return a rough upper estimate of the run's wall time."""
        engine = self.engine
        total = 0.0
        for group in self.groups:
            timed = [case for case in group.cases if case.protocol == "timed"]
            if timed:
                each = PREPARE_SECONDS + engine.warmup_seconds + 1.3 * engine.seconds
                total += engine.processes * (SPAWN_SECONDS + len(timed) * each)
            once = [case.case_key for case in group.cases if case.protocol == "once"]
            total += sum(SPAWN_SECONDS + self.seconds.get(key, Planned.seconds) for key in once)
        return total

    def resolved(self) -> dict[str, Any]:
        """Return what identifies the plan: its cases and how they are measured."""
        return {
            "groups": [[group.name, [case.case_key for case in group.cases]] for group in self.groups],
            "refused": [planned.case.case_key for planned in self.refused],  # a reason may tell of the free memory
            "engine": self.engine,
        }


def make_plan(config: RunConfig, registry: Registry, memory_bytes: float) -> Plan:
    """Declare every case, group what may be compared, and split groups that memory cannot hold."""
    planned: dict[str, Planned] = {}
    for block in config.blocks:
        suite = registry.get("suite", block.suite).create()
        for item in suite.cases(block, registry):
            planned.setdefault(item.case.case_key, _on_device(item))
    if not planned:
        raise MoebenchError("the plan has no cases: an axis or the list of layers is empty; give it a value.")
    groups: dict[str, list[Planned]] = {}
    for item in planned.values():
        groups.setdefault(item.case.group_key, []).append(item)
    pieces = [piece for key, items in groups.items() for piece in _split(key, items, memory_bytes)]
    seed = config.blocks[0].seed if config.blocks else 0
    seconds = {key: item.seconds for key, item in planned.items()}
    return Plan(tuple(pieces), config.engine, seed, config.shown, seconds)


def _on_device(item: Planned) -> Planned:
    """Refuse a case whose device is not here, or whose suite says itself that its numbers are the CPU's alone."""
    of_suite = ("cpu",) if item.case.evidence == Evidence.MEASURED_CPU else DEVICES
    return replace(item, refusal=item.refusal or device_refusal(item.case, of_suite=of_suite))


def _split(key: str, items: Sequence[Planned], memory_bytes: float) -> list[Group]:
    refused = tuple(item for item in items if item.refusal is not None)
    runnable = [item for item in items if item.refusal is None]
    if not runnable:
        return [Group(key, (), refused)]
    anchor, *rest = runnable
    pieces: list[list[Planned]] = [[anchor]]
    for item in rest:
        together = item.case.protocol == "timed"  # cases that run once are prepared and freed one by one
        if together and _bytes_of([*pieces[-1], item]) > memory_bytes and len(pieces[-1]) > 1:
            pieces.append([anchor])
        pieces[-1].append(item)
    names = [key] if len(pieces) == 1 else [f"{key}-{number}" for number in range(len(pieces))]
    return [
        Group(name, tuple(member.case for member in piece), refused if number == 0 else (), number)
        for number, (name, piece) in enumerate(zip(names, pieces, strict=True))
    ]


def _bytes_of(items: Sequence[Planned]) -> float:
    methods = {(item.case.method_key, item.case.dtype): item.method_bytes for item in items}
    shared: dict[tuple[str, str], float] = {}
    for item in items:
        alone = item.own_key or item.case.case_key
        for key, size in ((("copies", item.copies_key), item.copies_bytes), (("own", alone), item.own_bytes)):
            shared[key] = max(shared.get(key, 0.0), size)
    return sum(methods.values()) + sum(shared.values())


def shard(plan: Plan, text: str) -> Plan:
    """Return the part of the plan for shard ``i/n``: whole groups, so that no comparison is torn apart."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise MoebenchError(f"--shard {text} is not understood: write it as 1/4.") from None
    if not 1 <= index <= count:
        raise MoebenchError(f"--shard {text} does not exist: the first number goes from 1 to {max(count, 1)}.")
    ordered = sorted(plan.groups, key=lambda group: group.name)
    kept = {group.name for group in ordered[index - 1 :: count]}
    if not kept:
        raise MoebenchError(f"--shard {text} holds no group: the plan has only {len(ordered)}; use fewer shards.")
    return replace(plan, groups=tuple(group for group in plan.groups if group.name in kept))


def plan_hash(plan: Plan, sources: str, packages: Mapping[str, str], host_key: str) -> str:
    """Return the hash of the resolved plan, the sources, the installed packages and the host."""
    return make_key({"plan": plan.resolved(), "sources": sources, "packages": packages, "host": host_key})


def plan_lines(plan: Plan, registry: Registry) -> Iterable[str]:
    """Yield the plan as text: groups with their cases and executions, then what is refused, then the estimate."""
    for number, group in enumerate(plan.groups, 1):
        if not group.cases:
            continue
        first = group.cases[0]
        yield (
            f"group {number}: {first.suite} v{first.suite_version} | {first.model} layers {_layers(first.layers)} | "
            f"{first.traffic} T={first.tokens} {first.dtype} {first.pass_} {first.boundary} | threads={first.threads} "
            f"{first.residency} | {first.evidence}"
        )
        for case in group.cases:
            execution = case.execution
            extra = " folded" if execution.folded else ""
            yield (f"    {label(case, registry):58s} weights={execution.weights} sparse={execution.sparse}{extra}")
    for planned in plan.refused:
        yield f"skipped: {label(planned.case, registry)}: {planned.refusal}"
    seconds = plan.estimate_seconds()
    yield (
        f"{len(plan.cases)} cases in {sum(bool(g.cases) for g in plan.groups)} groups, {len(plan.refused)} skipped, "
        f"about {seconds / 60:.1f} minutes at most"
    )


def _layers(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) if len(layers) <= 4 else f"{layers[0]}..{layers[-1]} ({len(layers)})"


def label(case: Case, registry: Registry) -> str:
    """Return what tells a case from the others of its group: method and backend, with changed parameters."""
    if case.suite in ("roofline", "static"):  # no layer is called, and what is looked at is no plug-in
        return " ".join(str(value) for value in (*case.backend.params.values(), *case.workload.values()))
    parts = []
    for axis in ("structure", "routing", "quantization", "sparsity", "backend"):
        choice = getattr(case, axis)
        if choice.name != "none":
            parts.append(choice_label(choice, registry.get(axis, choice.name)))
    return " | ".join(parts)
