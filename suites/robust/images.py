"""Task ``images``: a CNN with expert filter banks, trained plainly or against attacks (AdvMoE, arXiv 2308.10110).

``adversarial`` is TRADES (arXiv 1901.08573) on banks and router at once. ``advmoe`` takes turns within each batch: the
banks learn against an attack on predictions and routes with the router fixed, then the router learns, against an attack
of its own, to send class y to bank y mod E and to stay there. Strengths as in the released code (beta 6, alpha 6), its
2 steps of attack in training and 10 in judgement; images are smaller, so ``epsilon`` is larger than its 8 / 255.

Shape letters: B images, L layers with banks, E banks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Check, Metric
from ..models import substream
from .attack import attacked, divergence
from .digits import CORRUPTIONS, Digits, load_digits
from .judged import Judged, calibration_error, items_of, mean
from .moe_cnn import MoeCnn

STEPS, BATCH, RATE = 400, 64, 0.004
BETA, ALPHA = 6.0, 6.0
TRAIN_ATTACK, TEST_ATTACK = 2, 10
BOUND = 1e-4
"""Largest difference of a logit from the oracle's, relative to the largest logit."""


def judge(workload: Mapping[str, Any], seed: int) -> Judged:
    """Train by ``workload['method']`` and judge on clean, attacked and corrupted images."""
    digits = load_digits(seed)
    model = MoeCnn()
    train(model, digits, workload["method"], workload["steps"] or STEPS, workload["epsilon"], seed)
    return judged(model.eval(), digits, workload["epsilon"], seed)


def train(model: MoeCnn, digits: Digits, method: str, steps: int, epsilon: float, seed: int) -> None:
    """Take ``steps`` batches; the learning rate falls to nothing along a cosine."""
    turns = TURNS[method](model, epsilon)
    optimizers = [torch.optim.AdamW(parameters, lr=RATE) for parameters, _ in turns]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, steps) for one in optimizers]
    batches = _batches(len(digits.train_label_B), seed)
    for _ in range(steps):
        chosen = next(batches)
        image_B1YX, label_B = digits.train_B1YX[chosen], digits.train_label_B[chosen]
        for (_, loss_of), optimizer, schedule in zip(turns, optimizers, schedules, strict=True):
            loss = loss_of(image_B1YX, label_B)
            model.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _batches(count: int, seed: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(substream(seed, "batches"))
    while True:
        yield from torch.split(torch.randperm(count, generator=rng), BATCH)[: count // BATCH]


Turn = tuple[list[nn.Parameter], Callable[[Tensor, Tensor], Tensor]]
"""What learns, and its loss of a batch of images and labels."""


def _standard(model: MoeCnn, epsilon: float) -> list[Turn]:
    def loss(image_B1YX: Tensor, label_B: Tensor) -> Tensor:
        return nnf.cross_entropy(model(image_B1YX), label_B)

    return [(list(model.parameters()), loss)]


def _adversarial(model: MoeCnn, epsilon: float) -> list[Turn]:
    def loss(image_B1YX: Tensor, label_B: Tensor) -> Tensor:
        fixed = model(image_B1YX).detach()
        worse = _attack(image_B1YX, lambda image: divergence(model(image), fixed), epsilon, TRAIN_ATTACK)
        clean = model(image_B1YX)
        return nnf.cross_entropy(clean, label_B) + BETA * divergence(model(worse), clean)

    return [(list(model.parameters()), loss)]


def _advmoe(model: MoeCnn, epsilon: float) -> list[Turn]:
    def worse_of(image_B1YX: Tensor) -> Tensor:
        fixed, routes = model(image_B1YX).detach(), model.route(image_B1YX).detach()

        def both(image: Tensor) -> Tensor:
            logits_BLE = model.route(image)
            return divergence(model(image, logits_BLE), fixed) + divergence(logits_BLE, routes)

        return _attack(image_B1YX, both, epsilon, TRAIN_ATTACK)

    def experts(image_B1YX: Tensor, label_B: Tensor) -> Tensor:
        worse = worse_of(image_B1YX)
        clean = model(image_B1YX)
        return nnf.cross_entropy(clean, label_B) + BETA * divergence(model(worse), clean)

    def router(image_B1YX: Tensor, label_B: Tensor) -> Tensor:
        worse = worse_of(image_B1YX)
        routes_BLE = model.route(image_B1YX)
        wanted_BL = (label_B % model.experts)[:, None].expand(routes_BLE.shape[:2])
        sent = nnf.cross_entropy(routes_BLE.flatten(0, 1), wanted_BL.flatten())
        return ALPHA * sent + BETA * divergence(model.route(worse), routes_BLE)

    return [(list(model.expert_parameters()), experts), (list(model.router.parameters()), router)]


TURNS: Mapping[str, Callable[[MoeCnn, float], list[Turn]]] = {
    "standard": _standard,
    "adversarial": _adversarial,
    "advmoe": _advmoe,
}


def _attack(image_B1YX: Tensor, loss_of: Callable[[Tensor], Tensor], epsilon: float, steps: int) -> Tensor:
    return attacked(image_B1YX, loss_of, epsilon, steps, 2.5 * epsilon / steps)


def judged(model: MoeCnn, digits: Digits, epsilon: float, seed: int) -> Judged:
    """Return accuracy clean, attacked and corrupted, calibration error and how often the attack moves a choice."""
    image_B1YX, label_B = digits.test_B1YX, digits.test_label_B
    worse = _attack(image_B1YX, lambda image: nnf.cross_entropy(model(image), label_B), epsilon, TEST_ATTACK)
    with torch.no_grad():
        logits_BK, under_attack_BK = model(image_B1YX), model(worse)
        moved_BL = model.route(image_B1YX).argmax(-1) != model.route(worse).argmax(-1)
        rng = torch.Generator().manual_seed(substream(seed, "corruptions"))
        corrupted = {name: model(change(image_B1YX, rng)) for name, change in CORRUPTIONS.items()}
    right = {"accuracy": logits_BK, "attacked_accuracy": under_attack_BK}
    right |= {f"{name}_accuracy": found for name, found in corrupted.items()}
    right_B = {name: (found.argmax(-1) == label_B).float() for name, found in right.items()}
    right_B["corrupted_accuracy"] = torch.stack([right_B[f"{name}_accuracy"] for name in CORRUPTIONS]).mean(0)
    metrics = [mean(name, values, substream(seed, "bootstrap", name)) for name, values in right_B.items()]
    metrics.append(Metric("calibration_error", calibration_error(logits_BK.softmax(-1), label_B), "1", n=len(label_B)))
    metrics.append(mean("router_flips", moved_BL.float().mean(1), substream(seed, "bootstrap", "flips")))
    items = items_of("images", {name: right_B[name].tolist() for name in ("accuracy", "attacked_accuracy")})
    return Judged(metrics, items, check(model, image_B1YX, worse, epsilon))


@torch.no_grad()
def check(model: MoeCnn, image_B1YX: Tensor, worse_B1YX: Tensor, epsilon: float) -> Check:
    """Compare the model with its chosen banks alone in float64, and see that the attack kept to its box."""
    wanted_BK = model.chosen_alone(worse_B1YX)
    error = float((model(worse_B1YX) - wanted_BK).abs().max() / wanted_BK.abs().max())
    if not error <= BOUND:
        return Check(False, error, BOUND, "the network is not the one of its chosen banks")
    near = float((worse_B1YX - image_B1YX).abs().max()) <= epsilon + 1e-6
    if not near or not 0 <= float(worse_B1YX.min()) <= float(worse_B1YX.max()) <= 1:
        return Check(False, error, BOUND, "attacked images lie outside their box")
    return Check(True, error, BOUND)
