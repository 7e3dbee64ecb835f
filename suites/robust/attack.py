"""Projected gradient descent within a box around an image (Madry et al., arXiv 1706.06083). B images, K classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor


def attacked(
    image_B1YX: Tensor, loss_of: Callable[[Tensor], Tensor], epsilon: float, steps: int, step: float
) -> Tensor:
    """Return the images after ``steps`` steps of ``step`` up the sign of the gradient of ``loss_of``.

    They stay within ``epsilon`` of the originals and within 0..1, and begin at random within that box.
    """
    start = image_B1YX + (2 * torch.rand_like(image_B1YX) - 1) * epsilon
    found = start.clamp(0, 1)
    for _ in range(steps):
        found = found.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(found), found)
        moved = found.detach() + step * gradient.sign()
        found = torch.minimum(torch.maximum(moved, image_B1YX - epsilon), image_B1YX + epsilon).clamp(0, 1)
    return found.detach()


def divergence(logits: Tensor, of: Tensor) -> Tensor:
    """Return the mean KL(softmax(of) || softmax(logits)) over all but the last dimension, in nats."""
    target, found = of.log_softmax(-1).flatten(0, -2), logits.log_softmax(-1).flatten(0, -2)
    return nnf.kl_div(found, target, reduction="batchmean", log_target=True)
