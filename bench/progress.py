"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere, nothing with --quiet.

Nothing here has a thread of its own: it is drawn between turns, so that it never competes with a timed call.
"""

from __future__ import annotations

import sys
import time
from typing import Any

REFRESH_SECONDS = 0.2
PLAIN_SECONDS = 15.0


class Progress:
    """Counts finished cases; ``tell`` says what is being done now."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._last = total, 0, 0.0
        self._bar: Any = None
        self._task: Any = None
        self._quiet = quiet
        if not quiet and sys.stderr.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total)

    def tell(self, what: str) -> None:
        """Say what is being done; drawn at most a few times a second."""
        moment = time.monotonic()
        if self._bar is not None and moment - self._last > REFRESH_SECONDS:
            self._last = moment
            self._bar.update(self._task, description=what, refresh=True)
        elif self._bar is None and not self._quiet and moment - self._last > PLAIN_SECONDS:
            self._last = moment
            self.line(f"  {what}")

    def done(self, cases: int, what: str) -> None:
        """Count ``cases`` finished ones."""
        self._done += cases
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=what, refresh=True)
        elif not self._quiet:
            self.line(f"[{self._done}/{self._total}] {what}")

    def line(self, text: str) -> None:
        """Print one line above the bar; nothing with --quiet."""
        if not self._quiet:
            self.error(text)

    def error(self, text: str) -> None:
        """Print one line above the bar, whatever was asked for: it says that something is wrong."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Countdown:
    """What is left of equal steps, by the time of those after the first, before which things are made ready."""

    def __init__(self) -> None:
        self._began: float | None = None

    def left(self, step: int, of: int) -> str:
        """Return what to say after ``step`` of ``of`` steps; nothing after the first and the last."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        seconds = (now - self._began) / max(1, step - 1) * (of - step)
        return f", about {seconds / 60:.1f} minutes left" if seconds else ""
