"""Suite ``target``: a callable of the user's own sources as a trial, for ``moebench gate --target``.

``make_trial()`` returns a callable without arguments, or an object with ``run()`` and, where it has them, ``steps``,
``verify(step, output)``, ``begin_turn()``, ``device_ns()`` and ``close()`` (``run`` then takes the step). The gate
compares the outputs of both sides, so a result must be returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal

from ..contracts import Case, Check, Cost, Facts, MoebenchError, Planned, Registry, Trial, load_attribute
from .base import SuiteConfig


class TargetSuite:
    """Declares nothing itself: its cases come from ``--target``."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Refuse: there is nothing to expand."""
        raise MoebenchError("suite target is run by `moebench gate --target package.module:make_trial`.")

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Import the target from this side's sources and make its trial."""
        target = str(case.workload["target"])
        try:
            factory = load_attribute(target)
        except ModuleNotFoundError as error:
            if not _is_or_holds(error.name, target.partition(":")[0]):
                raise
            raise MoebenchError(f"unknown target '{target}': {error}.") from error
        made = factory(*case.workload.get("arguments", ()))
        return TargetTrial(made, target)


def _is_or_holds(missing: str | None, module: str) -> bool:
    """Whether what is missing is the target's module or a package around it, and not something that it imports."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")


class TargetTrial:
    """A callable, or an object with ``run``, as the engine wants it."""

    state: Literal["none"] = "none"

    def __init__(self, made: Any, target: str) -> None:
        run = getattr(made, "run", made)
        if not callable(run):
            raise MoebenchError(
                f"{target} returned a {type(made).__name__}; return a callable or an object with run()."
            )
        self._made, self._run = made, run
        self.steps = int(getattr(made, "steps", 1))
        self._takes_step = _takes_argument(run)
        if hasattr(made, "device_ns"):
            self.device_ns = made.device_ns

    def begin_turn(self) -> None:
        """Let the target reset itself, where it wants to."""
        if hasattr(self._made, "begin_turn"):
            self._made.begin_turn()

    def run(self, step: int) -> Any:
        """Call the target."""
        return self._run(step) if self._takes_step else self._run()

    def verify(self, step: int, output: Any) -> Check:
        """Ask the target's own oracle where it has one; the gate compares both sides in any case."""
        if not hasattr(self._made, "verify"):
            return Check(True)
        found = self._made.verify(step, output)
        return found if isinstance(found, Check) else Check(bool(found), reason="" if found else "its verify() said no")

    def cost(self, step: int) -> Cost:
        """Nothing is known of what a callable must do."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return the target's own facts, if any."""
        found = self._made.facts() if hasattr(self._made, "facts") else Facts()
        return found if isinstance(found, Facts) else Facts()

    def close(self) -> None:
        """Let the target free what it holds."""
        if hasattr(self._made, "close"):
            self._made.close()


def _takes_argument(run: Any) -> bool:
    """Tell whether ``run`` wants the step: it has a parameter without a default."""
    try:
        parameters = inspect.signature(run).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(one.default is one.empty and one.kind in plain for one in parameters)


def create(params: Any) -> TargetSuite:
    """Make suite ``target``."""
    return TargetSuite()
