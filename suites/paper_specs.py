"""The claims of published systems as data: ``papers/<key>.yaml``, read strictly. Imports no torch.

A file has exactly the keys of ``Paper``. ``metric`` is one SELECT that returns seed, a and b over the runs made for the
claim; ``rule`` says what must hold between a and b (see ``results.claims``).
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from ..contracts import MoebenchError, coerce, unknown

LEAST_SEEDS = 3
"""An empirical claim gets an interval over at least so many seeds."""


@dataclass(frozen=True)
class PaperRun:
    """What is run for each seed: a suite and settings as on the command line."""

    suite: str
    overrides: Sequence[str]


@dataclass(frozen=True)
class PaperRule:
    """What must hold between a and b: as a ratio or a difference, equal, at most or at least, within a margin."""

    direction: Literal["equal", "at_most", "at_least"]
    margin: float
    unit: Literal["ratio", "difference"]


@dataclass(frozen=True)
class Paper:
    """One claim. ``figure`` is where the paper makes it, ``ours`` what is done here instead; ``cost_s`` in seconds.

    ``model`` is the model that is run, or ``none`` where the suite needs none.
    """

    key: str
    title: str
    claim: str
    figure: str
    ours: str
    kind: Literal["identity", "theorem", "empirical"]
    run: PaperRun
    metric: str
    rule: PaperRule
    seeds: Sequence[int]
    cost_s: float
    model: str

    def settings(self, seed: int) -> list[str]:
        """Return the settings of the run of one seed."""
        model = [] if self.model == "none" else [f"model={self.model}"]
        return [f"suite={self.run.suite}", *model, *self.run.overrides, f"seed={seed}"]


@functools.cache
def load_papers() -> tuple[Paper, ...]:
    """Return every claim that comes with moebench, by file name; the files are read once in a process."""
    folder = files("moebench.suites.papers")
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name)
    return tuple(read_paper(entry.read_text(encoding="utf-8"), entry.name) for entry in entries)


def choose_papers(papers: Sequence[Paper], keys: Iterable[str]) -> list[Paper]:
    """Return the papers of the given keys, all where none are given; a sentence for a key that does not exist."""
    known = {paper.key: paper for paper in papers}
    wanted = list(dict.fromkeys(keys)) or list(known)
    for key in wanted:
        if key not in known:
            raise MoebenchError(unknown("paper", key, known))
    return [known[key] for key in wanted]


def read_paper(text: str, file: str) -> Paper:
    """Return the claim written in ``text``; every mistake is one sentence that names ``file``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    where = f"papers/{file}"
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MoebenchError(f"{where} cannot be read ({first}); correct its YAML.") from error
    tree = _record(Paper, values, where)
    tree["run"] = PaperRun(**_record(PaperRun, tree["run"], f"{where}: run"))
    tree["rule"] = PaperRule(**_record(PaperRule, tree["rule"], f"{where}: rule"))
    paper = Paper(**tree)
    _check(paper, where, file)
    return paper


def _record(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Return ``values`` with exactly the fields of ``cls``, coerced to their types; nested records stay mappings."""
    if not isinstance(values, Mapping):
        raise MoebenchError(f"{where} must be a mapping of keys to values, not {type(values).__name__}; rewrite it.")
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise MoebenchError(f"{where}: {unknown('key', str(name), names)}")
    for name in names:
        if name not in values:
            raise MoebenchError(f"{where}: key '{name}' is missing; add it.")
    hints = typing.get_type_hints(cls)
    nested = (PaperRun, PaperRule)
    return {
        name: values[name] if hints[name] in nested else coerce(values[name], hints[name], f"{where}: key '{name}'")
        for name in names
    }


def _check(paper: Paper, where: str, file: str) -> None:
    if f"{paper.key}.yaml" != file:
        raise MoebenchError(f"{where}: key is '{paper.key}'; name the file {paper.key}.yaml.")
    if len(set(paper.seeds)) < len(paper.seeds) or not paper.seeds:
        raise MoebenchError(f"{where}: seeds must be different numbers, at least one; correct them.")
    if paper.kind == "empirical" and len(paper.seeds) < LEAST_SEEDS:
        raise MoebenchError(f"{where}: an empirical claim needs {LEAST_SEEDS} seeds or more; add some.")
    if paper.rule.direction == "equal" and paper.rule.margin < 0:
        raise MoebenchError(f"{where}: the margin of an equality is not negative; correct it.")
    if not paper.cost_s > 0:
        raise MoebenchError(f"{where}: cost_s is in seconds and above 0; correct it.")
    if any(word.partition("=")[0] in ("suite", "seed", "model") for word in paper.run.overrides):
        raise MoebenchError(f"{where}: suite, model and seed have keys of their own; take them out of the overrides.")
