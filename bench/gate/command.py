"""The command ``moebench gate``: are the cases of the candidate slower, larger or less exact than those of the base?"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...contracts import MoebenchError, Registry
from ...results.deterministic import Tolerance, judge_metrics
from ...results.gate import DOUBTS, GateResult, Judged, Skipped
from ...results.verdict import Verdict
from ...suites.models.cache import cache_dir
from .. import config, host
from ..progress import Progress
from ..run import DEFAULT_CACHE_BYTES, record, split_plugins, warn
from ..store import store_path
from .cases import Cases, backend_cases, planned_cases, target_cases
from .config import GateConfig, PairedCase
from .measure import LEFT_OUT, Measured, Measurement
from .moved import moved
from .once import Evaluations
from .outputs import deliver
from .record import open_run, past_noise, write
from .sides import Side, cleanup, environment_side, revision_side, wheel_side

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def gate(options: argparse.Namespace) -> int:
    """Run the command and return its exit status: see ``results.gate``."""
    plugins, settings = split_plugins(options.settings)
    settled = gate_config(options)
    store = store_path(options.store)
    cases = cases_of(options, settings, plugins)
    command = shlex.join(["moebench", *sys.argv[1:]])
    try:
        result = run_gate(sides_of(options), cases, settled, store, plugins, command, options.quiet)
    except KeyboardInterrupt:
        print("moebench: interrupted; nothing is kept, since a gate's sides must be taken together.", file=sys.stderr)
        return 130
    finally:
        cleanup(cache_dir())
    deliver(result, options)
    return result.status


def run_gate(
    chosen: Mapping[str, Side],
    cases: Cases,
    settled: GateConfig,
    store: Path,
    plugins: Sequence[str] = (),
    command: str = "",
    quiet: bool = True,
    environment: Mapping[str, str] | None = None,
) -> GateResult:
    """Measure the cases on both sides, judge them, and keep everything in the store."""
    started = time.monotonic()
    batches = ordered(cases.batches, past_noise(store)) if settled.budget else cases.batches
    facts, installed = host.host_facts(), host.packages()
    identity = [command, *(side.version for side in chosen.values()), str(time.time_ns())]
    folder = open_run(store, identity, record(command, facts, installed, {"gate": settled}))
    progress = Progress(cases.count, quiet)
    try:
        measured = Measurement(chosen, plugins, settled, progress.tell, environment).run(batches)
        left = None if settled.budget is None else settled.budget - (time.monotonic() - started)
        evaluated = Evaluations(chosen, plugins, settled, progress.tell, environment, left).run(cases.once)
        result = GateResult(
            run_id=folder.run_id,
            base=chosen["base"].name,
            candidate=chosen["candidate"].name,
            judged=(*judged_of(cases, measured, settled.tolerances), *evaluated.judged),
            skipped=(*skipped_of(cases, measured), *evaluated.skipped),
            noise=measured.worst_noise,
            seconds=time.monotonic() - started,
            asked_cases=cases.count + len(cases.refused),
            fail_on=tuple(settled.fail_on),
        )
        write(folder, result, measured)
    except BaseException:
        folder.discard()
        raise
    finally:
        progress.close()
        folder.close()
    return result


def ordered(batches: Sequence[Sequence[PairedCase]], noise: Mapping[str, float]) -> list[list[PairedCase]]:
    """Return the cases of each batch by past noise, the quietest first: these are decided soonest; then the unknown."""
    width = {case.key: noise.get(case.key, float("inf")) for batch in batches for case in batch}
    inner = [sorted(batch, key=lambda case: width[case.key]) for batch in batches]
    small = [batch[start : start + BUDGET_BATCH] for batch in inner for start in range(0, len(batch), BUDGET_BATCH)]
    return sorted(small, key=lambda batch: width[batch[0].key])


BUDGET_BATCH = 8
"""Cases in one ring where time is limited, so that some are finished when it runs out."""


def judged_of(cases: Cases, measured: Measured, tolerances: Mapping[str, Tolerance]) -> list[Judged]:
    """Return verdicts on times, and for each case with turns on its deterministic metrics, with what moved."""
    found: list[Judged] = []
    for batch in cases.batches:
        for case in batch:
            time_of = measured.judged.get(case.key)
            members = [member for member in measured.members.get(case.key, ()) if member.alive]
            ended = measured.ended.get(case.key, ("", ""))[0]
            if not members or ended not in ("", LEFT_OUT):
                continue
            rows = [*([time_of] if time_of else []), *metric_rows(case, members[-1].members, tolerances)]
            regressed = any(one.verdict == Verdict.REGRESSED for one in rows)
            why = moved(members, measured.versions) if regressed else ()
            found += [_with_reasons(one, why) for one in rows]
    return found


def _with_reasons(one: Judged, why: Sequence[str]) -> Judged:
    return replace(one, moved=tuple(why)) if one.verdict == Verdict.REGRESSED else one


def metric_rows(case: PairedCase, members: Mapping[str, object], tolerances: Mapping[str, Tolerance]) -> list[Judged]:
    """Return the verdicts on the deterministic metrics that the base's worker and the candidate's told."""
    base, candidate = (metric_values(members[side]) for side in ("base", "candidate"))
    named = {"label": case.label, "case_key": case.key, "base_case": case.base.case_key}
    return judge_metrics(base, candidate, tolerances, **named)


def metric_values(member: object) -> dict[str, float | None]:
    """Return the metrics of a member by name: those of its trial, its cost, and its numerical error."""
    facts, cost, check = (getattr(member, name, None) for name in ("facts", "cost", "check"))
    values: dict[str, float | None] = {metric["name"]: metric["value"] for metric in (facts or {}).get("metrics", ())}
    if cost and any(cost[name] for name in ("flops", "bytes")):  # a callable of the user's may not know its cost
        values |= {name: value for name, value in cost.items() if value is not None}
    if check is not None and check.error is not None:
        values["error"] = check.error
    return values


def skipped_of(cases: Cases, measured: Measured) -> list[Skipped]:
    """Return every case that has no verdict, with the reason."""
    named = {case.key: case.label for batch in cases.batches for case in batch}
    refused = [Skipped(case.label, case.key, "skipped", reason) for case, reason in cases.refused]
    return [*refused, *(Skipped(named[key], key, what, why) for key, (what, why) in measured.ended.items())]


# ---------------------------------------------------------------------------------------------------------------------
# From options to sides, cases and settings


def sides_of(options: argparse.Namespace) -> dict[str, Side]:
    """Return base and candidate; two backends are of one side's sources, the work tree or what is installed."""
    return {side: _side(options, side) for side in ("base", "candidate")}


def _side(options: argparse.Namespace, side: str) -> Side:
    cache = cache_dir()
    given = {kind: getattr(options, f"{side}{kind}") for kind in ("", "_wheel", "_env")}
    named = [kind for kind, value in given.items() if value]
    if len(named) > 1:
        raise MoebenchError(f"--{side}, --{side}-wheel and --{side}-env name one side twice; keep one of them.")
    if given["_wheel"]:
        return wheel_side(Path(given["_wheel"]), cache)
    if given["_env"]:
        return environment_side(Path(given["_env"]))
    if given[""]:
        return revision_side(Path.cwd(), given[""], cache)
    if options.base_backend:
        return Side(f"backend {getattr(options, f'{side}_backend')}", sys.executable, {}, None, "here")
    if side == "base":
        raise MoebenchError("name what to compare with: --base REV, --base-wheel, --base-env or --base-backend.")
    return revision_side(Path.cwd(), ".", cache)


def cases_of(options: argparse.Namespace, settings: Sequence[str], plugins: Sequence[str]) -> Cases:
    """Return the cases that the options describe."""
    if options.target:
        if settings:
            raise MoebenchError(f"--target takes no settings such as {settings[0]}: it says itself what runs.")
        if options.base_backend or options.candidate_backend:
            raise MoebenchError("--target runs your own code and no backend; leave --base-backend out of it.")
        return target_cases(options.target, "cuda" if options.devices else "cpu")
    if bool(options.base_backend) != bool(options.candidate_backend):
        raise MoebenchError("two backends are compared by --base-backend NAME and --candidate-backend NAME together.")
    registry = Registry.load(plugins)
    warn(registry)
    import psutil

    available = float(psutil.virtual_memory().available)
    cache = float(host.last_level_cache() or DEFAULT_CACHE_BYTES)
    given = list(settings) or ["suite=selftest"]
    if options.base_backend:
        for name in (options.base_backend, options.candidate_backend):
            registry.get("backend", name)
        given.append(f"axes.backend=[{options.base_backend},{options.candidate_backend}]")
    settled = config.load(given, registry, available / 3, cache)
    memory = available * settled.engine.memory
    if options.base_backend:
        cases = backend_cases(settled, registry, memory, options.base_backend, options.candidate_backend)
    else:
        cases = planned_cases(settled, registry, memory)
    if not cases.count:
        reasons = "; ".join(sorted({reason for _, reason in cases.refused})[:3])
        raise MoebenchError(f"nothing of the plan can be gated: {reasons or 'it has no cases; choose others.'}")
    return cases


def gate_config(options: argparse.Namespace) -> GateConfig:
    """Return the settings of the command line, checked."""
    for name in options.fail_on:
        if name not in DOUBTS:
            raise MoebenchError(f"--fail-on {name} is not known: take {' or '.join(DOUBTS)}.")
    return GateConfig(
        seconds=options.seconds,
        max_seconds=max(options.max_seconds, options.seconds),
        budget=duration(options.budget) if options.budget else None,
        margin=options.margin,
        detect=options.detect,
        fail_on=tuple(options.fail_on),
        metric_margins=dict(margin_of(text) for text in options.metric_margin),
        item_margins=dict(margin_of(text, "--item-margin", "acc=0.02") for text in options.item_margin),
        devices=tuple(options.devices.split(",")) if options.devices else (),
    )


def margin_of(text: str, option: str = "--metric-margin", example: str = "bytes=0.02") -> tuple[str, float]:
    """Return (metric, number) of ``NAME=NUMBER``."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise MoebenchError(f"{option} {text} is not understood; write it as {example}.") from None


def duration(text: str) -> float:
    """Return the seconds of a time such as ``90s``, ``8m``, ``1h`` or ``45``."""
    unit = UNITS.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise MoebenchError(f"--budget {text} is no time; write it as 90s, 8m or 1h.") from None
