"""Models of workloads: trained by the trainer, kept in the cache by everything that made them.

The trained weights are an artefact; a killed training goes on from its checkpoint. Same seed, same bits on one machine.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...contracts import make_key, plain
from ...moe import artefacts, routing
from ...moe.artefacts import Artefact
from ...moe.balance import registry
from ..models import cache_dir, substream
from ..models.cache import locked
from ..training import experts
from ..training import trainer as trainer_module
from ..training.settings import Settings
from ..training.task import Task
from ..training.trainer import Trainer


def sources(modules: Sequence[ModuleType]) -> str:
    """Return one sha256 over the source files of ``modules``, of the trainer, and of what all models are made of."""
    digest = hashlib.sha256()
    for module in (*modules, trainer_module, experts, registry, routing):
        digest.update(Path(str(module.__file__)).read_bytes() + b"\0")
    return digest.hexdigest()


def trained(task: Task, settings: Settings, identity: Any, modules: Sequence[ModuleType]) -> float:
    """Give ``task.model`` its trained weights and return the last loss.

    ``identity`` names the task: parameters, seed and data; ``modules`` are those that its weights follow from.
    """
    inputs = {
        "workload": plain(identity),
        "settings": plain(settings),
        "sources": sources(modules),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    cache, work = cache_dir(), cache_dir() / "workloads" / make_key(inputs)

    def build() -> Artefact:
        with locked(work):
            # A folder of its own: writing a checkpoint takes the lock of the folder that holds it.
            trainer = Trainer(task, settings, work / "checkpoints", make_key(inputs))
            trainer.advance(settings.steps)
        return Artefact(dict(task.model.state_dict()), {"loss": trainer.curves["loss"]})

    found = artefacts.cached(cache, inputs, build, lambda made: made, lambda kept: kept)
    shutil.rmtree(work, ignore_errors=True)
    task.model.load_state_dict(found.tensors)
    task.model.eval()
    return float(found.meta["loss"][-1])


def schedule(steps: int, lr: float, seed: int, weight_decay: float = 0.1) -> Settings:
    """Return the settings of a short training that nothing is watched in."""
    warmup = min(20, steps)
    return Settings(steps, lr, warmup, weight_decay=weight_decay, evaluate_every=steps, checkpoint_every=200, seed=seed)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a generator of a named stream below ``seed``."""
    return torch.Generator().manual_seed(substream(seed, *names))
