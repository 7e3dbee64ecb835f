"""The trial of suite ``distillation``: a step is one stage of the recipe."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...contracts import Case, Check, Cost, Facts, Metric, Registry, Series, make_key
from ..digest import sha256_of
from ..models.cache import locked
from ..quality.passage import token_bytes
from . import corpus, experts
from .dense2moe import used_parameters
from .distill import Text, held_out_divergence
from .language import Windows, bits_per_byte, encode, take_windows
from .recipes import Setup, recipe
from .settings import Settings
from .trainer import Trainer

BOUND = 1e-3
"""Between the divergence as it is trained on, in float32, and by its definition in float64, as a part of itself."""

FLOOR = 1e-6
"""Nats per token below which a divergence is nothing but rounding."""


class DistillationTrial:
    """Makes the student of one recipe; its checkpoints are removed when all stages are done."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        params, own = registry.params("model", case.model), case.workload
        source = registry.get("model", case.model.name).create(case.model.params)
        self.teacher, tokenizer = source.language_model()
        self.teacher.set_experts_implementation(experts.register())
        text = distillation_text(params, tokenizer, own["windows"])
        made_by = [torch.__version__, folder_sha256()]
        identity = make_key([case.weights_sha256, dict(own), case.seed, case.threads, made_by])
        self.work: Path = params.home() / "distillation" / identity[:16]
        self._open = contextlib.ExitStack()
        self._open.enter_context(locked(self.work))
        warmup = max(1, own["steps"] // 20)
        settings = Settings(own["steps"], own["lr"], warmup, evaluate_every=50, checkpoint_every=50, seed=case.seed)
        setup = Setup(self.teacher, text, settings, self.work / "checkpoints", identity)
        self.before = sha256_of(*self.teacher.state_dict().values())
        self.held_out: Windows = text.held_out
        self.recipe = recipe(own["recipe"], setup, own["steps"])
        self.steps, self.done = self.recipe.stages, 0
        self.trainers: list[Trainer] = []
        self.at_start = math.nan
        self.teacher_bits = bits_per_byte(self.teacher, self.held_out)
        self.begun: Any = None

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> float:
        """Run one stage; return the held-out divergence after it, in nats per token."""
        self.begun = self.recipe.begun().eval() if step == 0 else None
        if step == 0:
            self.at_start = held_out_divergence(self.begun, self.teacher, self.held_out, "cpu")
        self.trainers.append(self.recipe.run(step))
        self.done = step + 1
        return self.trainers[-1].evaluations["kl"][-1]

    def verify(self, step: int, output: float) -> Check:
        """Compare figures with their definitions in float64; the teacher must still be what it was."""
        if not math.isfinite(output):
            return Check(False, reason="the divergence is no number; lower suite.lr")
        if sha256_of(*self.teacher.state_dict().values()) != self.before:
            return Check(False, reason="the teacher was changed by its student's training")
        error, name = max((abs(mine - exact) / max(exact, FLOOR), name) for name, mine, exact in self._pairs(output))
        return Check(error <= BOUND, error, BOUND, "" if error <= BOUND else f"{name} differs from its definition")

    def _pairs(self, output: float) -> Iterator[tuple[str, float, float]]:
        """Yield what was found after the last stage, and before the first one, with what it is by its definition."""
        student, teacher, text = self.recipe.student, self.teacher, self.held_out
        yield "the divergence", output, exact_divergence(student, teacher, text)
        yield "bits per byte", self.trainers[-1].evaluations["bits_per_byte"][-1], exact_bits_per_byte(student, text)
        if self.begun is not None:
            yield "the untrained divergence", self.at_start, exact_divergence(self.begun, teacher, text)
            yield "the teacher's bits per byte", self.teacher_bits, exact_bits_per_byte(teacher, text)

    def cost(self, step: int) -> Cost:
        """Return nothing: training has no latency to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return what the student lost of its teacher, untrained and trained, and the curves of each stage."""
        if self.done < self.steps:
            return Facts()
        last, student = self.trainers[-1], self.recipe.student
        tokens = self.held_out.ids_BT[:, 1:].numel()
        metrics = (
            Metric("kl_to_teacher", last.evaluations["kl"][-1], "nat/token", n=tokens),
            Metric("kl_untrained", self.at_start, "nat/token", n=tokens),
            Metric("bits_per_byte", last.evaluations["bits_per_byte"][-1], "bit/byte", n=tokens),
            Metric("teacher_bits_per_byte", self.teacher_bits, "bit/byte", n=tokens),
            Metric("parameters", float(used_parameters(student)), "1"),
            Metric("active_expert_parameters", self.recipe.active(), "1"),
            Metric("training_steps", float(sum(trainer.step for trainer in self.trainers)), "1"),
        )
        curves = [
            Series(f"stage_{number}_{name}", tuple(values), "1")
            for number, trainer in enumerate(self.trainers)
            for name, values in trainer.curves.items()
        ]
        return Facts(metrics, tuple(curves))

    def close(self) -> None:
        """Remove the checkpoints of what is done, and let others work."""
        if self.done == self.steps:
            shutil.rmtree(self.work / "checkpoints", ignore_errors=True)
        self._open.close()


def distillation_text(params: Any, tokenizer: Any, windows: int) -> Text:
    """Return the text that the model was trained on, and ``windows`` windows of what was held out of it."""
    texts, sizes = corpus.load(params.data), params.sizes
    held_out_N = encode(tokenizer, texts.held_out.content)
    held_out = take_windows(held_out_N, token_bytes(tokenizer, held_out_N), windows, sizes.window)
    ids_N = encode(tokenizer, texts.training.content)
    return Text(ids_N, held_out, (sizes.windows, sizes.window), tokenizer.bos_token_id)


@torch.no_grad()
def exact_divergence(student: Any, teacher: Any, held_out: Windows) -> float:
    """Return sum p (log p - log q) of the next token in float64 from whole logits, the mean over predicted tokens."""
    total, count = 0.0, 0
    for ids_T in held_out.ids_BT:
        log_p_TV, log_q_TV = (_log_probabilities(model, ids_T[:-1]) for model in (teacher, student))
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        count += len(log_p_TV)
    return total / count


@torch.no_grad()
def exact_bits_per_byte(model: Any, held_out: Windows) -> float:
    """Return -log2 p of every token but each window's first, in float64 from whole logits, by the bytes of these."""
    nats = 0.0
    for ids_T in held_out.ids_BT:
        nats -= float(_log_probabilities(model, ids_T[:-1]).gather(1, ids_T[1:, None]).sum())
    return nats / math.log(2) / held_out.bytes


def folder_sha256() -> str:
    """Return the hash of the sources of training, by which checkpoints of other ones are known."""
    return make_key({file.name: file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))})


def _log_probabilities(model: Any, ids_T: Tensor) -> Tensor:
    logits_TV: Tensor = model(ids_T[None], use_cache=False).logits[0]
    return logits_TV.double().log_softmax(-1)
