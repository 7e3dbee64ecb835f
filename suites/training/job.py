"""What a model hands to suite ``pretraining``: a task, and what to do when it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ...contracts import Metric, Series
from .settings import Settings
from .task import Task
from .trainer import Trainer


class Job(Protocol):
    """A training to be done."""

    task: Task
    settings: Settings
    identity: str
    """Names the task, so that no checkpoint of another one is gone on from."""
    folder: Path
    """Where checkpoints and the result lie."""

    def finish(self, trainer: Trainer) -> tuple[list[Metric], list[Series]]:
        """Keep the trained model in the cache and return what is to be said of it."""
