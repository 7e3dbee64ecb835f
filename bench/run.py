"""The command ``moebench run``: plan, measure, ingest, and say how it went."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contracts import MoebenchError, Registry, Status, plain
from ..version import __version__
from . import config, host
from .flags import Limits
from .plan import Plan, make_plan, plan_hash, plan_lines, shard
from .progress import Progress
from .rundir import RunFolder
from .runner import Outcome, Runner
from .store import store_path

DEFAULT_CACHE_BYTES = 64 * 2**20
"""Taken for the last-level cache where the system does not tell its size."""


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    run_id: str
    store: Path
    outcome: Outcome


def run(options: argparse.Namespace) -> int:
    """Run the command; exit status 1 for any case that is neither ok nor skipped (with --strict: for flags too)."""
    if options.multirun:
        from .multirun import multirun

        return multirun(options.settings, _flags(options))
    plugins, settings = split_plugins(options.settings)
    registry = Registry.load(plugins)
    warn(registry)
    plan, settled = planned(settings, registry, options.shard)
    if options.plan:
        print("\n".join(plan_lines(plan, registry)))
        return 0
    if not plan.cases:
        print("\n".join(plan_lines(plan, registry)))
        raise MoebenchError("nothing of the plan can run here; see the reasons above.")
    command = shlex.join(["moebench", "run", *options.settings])
    finished = execute(plan, plugins, store_path(settled.store), command, options.quiet)
    _tell(finished, options)
    return exit_status(finished.outcome, options.strict)


def _flags(options: argparse.Namespace) -> list[str]:
    """Return the flags of this command as they were given, for the runs of a multirun."""
    shard = ["--shard", options.shard] if options.shard else []
    return shard + [f"--{name}" for name in ("plan", "quiet", "strict", "report") if getattr(options, name)]


def split_plugins(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (plug-in files as absolute paths, the other settings)."""
    files = [str(Path(s.removeprefix("plugin=")).absolute()) for s in settings if s.startswith("plugin=")]
    return files, [s for s in settings if not s.startswith("plugin=")]


def warn(registry: Registry) -> None:
    """Print what is wrong with installed plug-ins; the others work on."""
    for problem in registry.problems:
        print(f"moebench: {problem}", file=sys.stderr)


def planned(settings: Sequence[str], registry: Registry, part: str | None = None) -> tuple[Plan, config.RunConfig]:
    """Return the plan that the settings describe, with its configuration."""
    import psutil

    cache = host.last_level_cache() or DEFAULT_CACHE_BYTES
    available = float(psutil.virtual_memory().available)
    settled = config.load(settings, registry, available, float(cache))
    plan = make_plan(settled, registry, available * settled.engine.memory)
    return (shard(plan, part) if part else plan), settled


def execute(plan: Plan, plugins: Sequence[str], store: Path, command: str, quiet: bool) -> Finished:
    """Measure the plan into the store, going on with an unfinished run of the same plan, and ingest."""
    from ..results.database import ingest

    facts = host.host_facts()
    installed = host.packages()
    key = plan_hash(plan, host.source_hash(list(plugins)), installed, facts["host_key"])
    folder = RunFolder.open(store, key, record(command, facts, installed, plan.config))
    progress = Progress(len(plan.cases), quiet)
    try:
        limits = functools.partial(Limits.of_host, store, facts["host_key"], facts["stable"]["caches"])
        outcome = Runner(plan, folder, plugins, progress, limits).execute()
        folder.finish(phases=outcome.phases)
        report = ingest(store)
        for sentence in report.set_aside + report.left_out:
            progress.error(f"moebench: {sentence}")
    finally:
        progress.close()
        folder.close()
    return Finished(folder.run_id, store, outcome)


def record(
    command: str, facts: Mapping[str, Any], installed: Mapping[str, str], settled: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``run.json`` says of a run besides its times: command, sources, packages, settings and host."""
    sha, dirty = host.git_facts(Path(__file__).resolve().parent.parent)
    stable = facts["stable"]
    return {
        "command": command,
        "host_key": facts["host_key"],
        "git_sha": sha,
        "git_dirty": dirty,
        "version": __version__,
        "packages": {name: installed[name] for name in host.PACKAGES if name in installed},
        "config": plain(settled),
        "host": {
            "cpu": stable["cpu"],
            "cores": stable["cores"],
            "memory_bytes": stable["memory_bytes"],
            "facts": {**stable, **facts["snapshot"]},
        },
    }


def _tell(finished: Finished, options: argparse.Namespace) -> None:
    if options.quiet and not options.report:
        return
    from ..dashboards.text import summary_table
    from ..results.query import reading

    with reading(finished.store) as connection:
        print(summary_table(connection, finished.run_id))
    phases = finished.outcome.phases
    share = phases["engine_share"]
    print(f"run {finished.run_id}: {phases['wall']:.1f} s, engine's own share {share:.1%}; store {finished.store}")
    if options.report:
        from ..dashboards.report import write_report

        path = write_report(finished.store, finished.store / "report.html", finished.run_id)
        print(f"report: {path}")


def exit_status(outcome: Outcome, strict: bool) -> int:
    """Return 1 where a case is neither ok nor skipped, or (strict) carries a flag; 0 otherwise."""
    bad = sum(count for status, count in outcome.counts.items() if status not in (Status.OK, Status.SKIPPED))
    return int(bool(bad or (strict and outcome.flagged)))
