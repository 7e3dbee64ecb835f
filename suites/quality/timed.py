"""A stage of a recipe that tells how long its step took. Imported by workers only."""

from __future__ import annotations

import time
from typing import Any

from ...moe.recipe import Stage


class TimedStage(Stage):
    """A stage whose step tells how long it took: ``elapsed`` seconds on the wall clock, of its last call."""

    elapsed: float = 0.0

    def create(self) -> Any:
        """Return the step; what it imports when it is called is part of its first time."""
        step = super().create()

        def timed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            made = step(*args, **named)
            self.elapsed = time.perf_counter() - started
            return made

        return timed
