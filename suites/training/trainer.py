"""The trainer: any Task, on CPU or CUDA, the same bits at every start and after every interruption.

Nothing random outlives a step: each step begins with seeds of its own, and a Task's data follow from the step. So a
checkpoint holds weights, the optimizer's moments, the number of steps and the curves, and no state of any generator.
On one machine with one number of threads the curves are the same bit for bit, with kills and without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import MoebenchError, make_key, plain
from ..models import substream
from . import checkpoint
from .checkpoint import Checkpoint
from .settings import Settings
from .task import Task

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """Trains ``task`` step by step and goes on from the newest checkpoint in ``folder``.

    ``curves`` has one value per step of the learning rate, the gradient's norm before clipping and what the task keeps;
    ``evaluations`` one per evaluation, which came after so many steps as ``evaluated`` says. ``identity`` names the
    task: a checkpoint of another task or of other settings is refused.
    """

    def __init__(self, task: Task, settings: Settings, folder: Path, identity: str, device: str = "cpu") -> None:
        self.task, self.settings, self.folder, self.device = task, settings, folder, device
        self.identity = make_key([identity, settings])
        self.parameters: dict[str, Tensor] = dict(task.model.named_parameters())
        self.optimizer = _optimizer(list(self.parameters.values()), settings)
        self.step = 0
        self.curves: dict[str, list[float]] = {}
        self.evaluated: list[int] = []
        self.evaluations: dict[str, list[float]] = {}
        self._resume()

    def advance(self, until: int) -> None:
        """Train until ``until`` steps are done, with the evaluations and checkpoints that fall due."""
        settings = self.settings
        with deterministic():
            while self.step < min(until, settings.steps):
                self._take_step()
                last = self.step == settings.steps
                if last or self.step % settings.evaluate_every == 0:
                    self._evaluate()
                if last or self.step % settings.checkpoint_every == 0:
                    self.save()

    def _take_step(self) -> None:
        settings = self.settings
        torch.manual_seed(substream(settings.seed, "step", self.step))
        self.task.model.train()
        lr = settings.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss, shown = self.task.loss(self.task.batch(self.step))
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tensors = {"gradient_norm": norm, **shown}
        found = {"lr": lr, **{name: float(tensor.detach()) for name, tensor in tensors.items()}}
        for name, value in found.items():
            self.curves.setdefault(name, []).append(value)

    def _evaluate(self) -> None:
        torch.manual_seed(substream(self.settings.seed, "evaluation", self.step))
        self.task.model.eval()
        with torch.no_grad():
            found = self.task.evaluate()
        self.evaluated.append(self.step)
        for name, value in found.items():
            self.evaluations.setdefault(name, []).append(float(value))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of what is there now."""
        tensors = {f"model.{name}": tensor for name, tensor in self._kept()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS if moment in moments}
        own = {name: getattr(self, name) for name in ("identity", "curves", "evaluated", "evaluations")}
        copies = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        checkpoint.save(self.folder, Checkpoint(self.step, copies, plain(own)))

    def _resume(self) -> None:
        found = checkpoint.latest(self.folder)
        if found is None:
            return
        if found.state["identity"] != self.identity:
            raise MoebenchError(f"{self.folder} holds a checkpoint of another training; delete it and run again.")
        with torch.no_grad():
            for name, tensor in self._kept():
                tensor.copy_(found.tensors[f"model.{name}"])
        for name, parameter in self.parameters.items():
            if f"{MOMENTS[0]}.{name}" in found.tensors:
                moments = {m: found.tensors[f"{m}.{name}"].clone().to(parameter.device) for m in MOMENTS}
                count = torch.tensor(float(found.step), dtype=torch.float32, device=parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}
        self.step = found.step
        for name in ("curves", "evaluated", "evaluations"):
            setattr(self, name, found.state[name])

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, and the buffers that belong to the model's state."""
        yield from self.parameters.items()
        persistent = set(self.task.model.state_dict())
        yield from ((name, buffer) for name, buffer in self.task.model.named_buffers() if name in persistent)


def _optimizer(parameters: list[Tensor], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices alone; vectors are norms and biases."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Have torch use the algorithms that give the same bits each time until the block ends."""
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # its flag is a property of the module
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads it, and filling costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
