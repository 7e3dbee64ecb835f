"""A small MLP that learns how much a block turns its input, from the input alone (QuantMoE-Bench, arXiv 2406.08155).

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import seeded_normal
from .params import CosinePredictor


class Predictor(nn.Module):
    """tanh(w2 relu(W1 x) + b): the cosine that a token is predicted to have with the block's output."""

    def __init__(self, hidden: int, width: int, seed: int) -> None:
        super().__init__()
        self.inner_DH = nn.Parameter(seeded_normal((width, hidden), hidden**-0.5, seed, "cosine inner"))
        self.outer_D = nn.Parameter(seeded_normal((width,), width**-0.5, seed, "cosine outer"))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return the predicted cosines [T]."""
        return torch.tanh(torch.relu(nnf.linear(x_TH, self.inner_DH)) @ self.outer_D + self.bias)

    def score(self, x_TH: Tensor) -> float:
        """Return the mean predicted cosine of a block: the lower, the more important the block."""
        with torch.no_grad():
            return float(self(x_TH.float()).mean())


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained predictor and how it does on tokens whose gradients it never saw, but which chose its epoch.

    ``held_out_error`` is its mean squared error, the least of all epochs, so that it flatters the predictor, and
    ``held_out_variance`` the variance of their cosines: an error not below the variance says that it learned nothing.
    ``epochs`` were run; the predictor is that of the best of them.
    """

    predictor: Predictor
    held_out_error: float
    held_out_variance: float
    epochs: int


def fit_predictor(in_TH: Tensor, cosine_T: Tensor, params: CosinePredictor, seed: int) -> Fitted:
    """Return the predictor of ``cosine_T`` from ``in_TH``, at its best on the held-out tokens, which ``seed`` draws."""
    held = max(1, round(params.held_out * len(in_TH)))
    if len(in_TH) - held < 1:
        raise ValueError(f"{len(in_TH)} tokens cannot be split for training and judging a predictor; give more.")
    x_TH, wanted_T = in_TH.detach().float(), cosine_T.detach().float()
    if not bool(x_TH.isfinite().all()) or not bool(wanted_T.isfinite().all()):
        raise ValueError("the block's inputs or cosines contain NaN or infinity; look at the model.")
    generator = torch.Generator().manual_seed(seed)
    order_T = torch.randperm(len(x_TH), generator=generator)
    judged, trained = order_T[:held], order_T[held:]
    predictor = Predictor(x_TH.shape[1], params.width, seed)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=params.lr, weight_decay=params.weight_decay)
    best, best_error, best_epoch, epoch = predictor, math.inf, 0, 0
    while epoch < params.epochs and epoch - best_epoch < params.patience:
        epoch += 1
        order_S = trained[torch.randperm(len(trained), generator=generator)]
        _train_epoch(predictor, optimizer, x_TH[order_S], wanted_T[order_S], params.batch)
        with torch.no_grad():
            error = float(nnf.mse_loss(predictor(x_TH[judged]), wanted_T[judged]))
        if error < best_error:
            best, best_error, best_epoch = copy.deepcopy(predictor), error, epoch
    return Fitted(best, best_error, float(wanted_T[judged].var(correction=0)), epoch)


def _train_epoch(
    predictor: Predictor, optimizer: torch.optim.Optimizer, x_TH: Tensor, wanted_T: Tensor, batch: int
) -> None:
    with torch.enable_grad():
        for start in range(0, len(x_TH), batch):
            optimizer.zero_grad()
            loss = nnf.mse_loss(predictor(x_TH[start : start + batch]), wanted_T[start : start + batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
