"""Sparse autoencoders of activations, and what they are held against (attention output SAEs, arXiv 2406.17759).

f = ReLU((x - b_d) W_e + b_e), x' = f W_d + b_d with unit rows of W_d; loss |x - x'|^2 + lambda |f|_1, mean over tokens.
Shape letters: T tokens, D width of x, S entries of the dictionary, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

BETAS = (0.0, 0.9999)
RESAMPLINGS = 4
"""So often in a training entries that did not fire since the last time are made anew, as in the official code."""

RESAMPLED = 0.2
"""Length of a new encoder column, as part of the mean of the others."""


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is trained: Adam of rate ``lr``, ``steps`` of ``batch`` tokens, penalty ``sparsity``."""

    entries: int
    sparsity: float
    steps: int
    batch: int
    lr: float


class Dictionary(nn.Module):
    """A sparse autoencoder, float32; ``decoder_SD`` has unit rows and starts as the encoder's transpose."""

    def __init__(self, width: int, entries: int, rng: torch.Generator) -> None:
        super().__init__()
        self.decoder_SD = nn.Parameter(nnf.normalize(torch.randn(entries, width, generator=rng), dim=1))
        self.encoder_DS = nn.Parameter(self.decoder_SD.detach().T.clone())
        self.encoder_S = nn.Parameter(torch.zeros(entries))
        self.decoder_D = nn.Parameter(torch.zeros(width))

    def encode(self, x_TD: Tensor) -> Tensor:
        """Return f [T, S]."""
        return nnf.relu((x_TD - self.decoder_D) @ self.encoder_DS + self.encoder_S)

    def decode(self, f_TS: Tensor) -> Tensor:
        """Return x' [T, D]."""
        return f_TS @ self.decoder_SD + self.decoder_D

    def loss(self, x_TD: Tensor, sparsity: float) -> Tensor:
        """Return the training loss, a mean over tokens."""
        f_TS = self.encode(x_TD)
        return (self.decode(f_TS) - x_TD).square().sum(1).mean() + sparsity * f_TS.sum(1).mean()

    @torch.no_grad()
    def unit(self) -> None:
        """Bring the decoder's rows back to length 1."""
        self.decoder_SD.copy_(nnf.normalize(self.decoder_SD, dim=1))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the length of its rows."""
        grad_SD = self.decoder_SD.grad
        if grad_SD is not None:
            grad_SD -= (grad_SD * self.decoder_SD).sum(1, keepdim=True) * self.decoder_SD


def train(x_TD: Tensor, recipe: Recipe, seed: int) -> tuple[Dictionary, list[float]]:
    """Return a dictionary of the tokens ``x_TD``, float32, and the loss of every step."""
    rng = torch.Generator().manual_seed(seed)
    model = Dictionary(x_TD.shape[1], recipe.entries, rng)
    model.decoder_D.data.copy_(x_TD.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=BETAS)
    losses, fired_S = [], torch.zeros(recipe.entries, dtype=torch.bool)
    every = max(1, recipe.steps // (RESAMPLINGS + 1))
    for step in range(recipe.steps):
        batch_TD = x_TD[torch.randint(len(x_TD), (recipe.batch,), generator=rng)]
        optimizer.zero_grad()
        f_TS = model.encode(batch_TD)
        error_T = (model.decode(f_TS) - batch_TD).square().sum(1)
        loss = error_T.mean() + recipe.sparsity * f_TS.sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        model.project_gradient()
        optimizer.step()
        model.unit()
        losses.append(float(loss.detach()))
        fired_S |= (f_TS > 0).any(0)
        if (step + 1) % every == 0 and step + 1 <= RESAMPLINGS * every and step + 1 < recipe.steps:
            resample(model, optimizer, ~fired_S, batch_TD, error_T.detach(), rng)
            fired_S.zero_()
    return model.eval(), losses


@torch.no_grad()
def resample(
    model: Dictionary,
    optimizer: torch.optim.Optimizer,
    dead_S: Tensor,
    x_TD: Tensor,
    error_T: Tensor,
    rng: torch.Generator,
) -> None:
    """Make dead entries anew from tokens that are badly told, each drawn in proportion to its squared error."""
    dead = dead_S.nonzero().flatten()
    if len(dead) == 0 or bool(dead_S.all()):
        return
    drawn = torch.multinomial(error_T.square() + 1e-12, len(dead), replacement=True, generator=rng)
    row_SD = nnf.normalize(x_TD[drawn] - model.decoder_D, dim=1)
    length = RESAMPLED * float(model.encoder_DS[:, ~dead_S].norm(dim=0).mean())
    model.decoder_SD[dead] = row_SD
    model.encoder_DS[:, dead] = length * row_SD.T
    model.encoder_S[dead] = 0.0
    for parameter, place in (
        (model.decoder_SD, (dead,)),
        (model.encoder_DS, (slice(None), dead)),
        (model.encoder_S, (dead,)),
    ):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name][place] = 0.0


def principal(x_TD: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean [D], the first principal directions [K, D] and all variances [D], falling; float64."""
    x_TD = x_TD.double()
    mean_D = x_TD.mean(0)
    centred_TD = x_TD - mean_D
    variance_D, direction_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(x_TD))
    return mean_D, direction_DD.flip(1)[:, :components].T, variance_D.flip(0)


def by_principal(x_TD: Tensor, mean_D: Tensor, direction_KD: Tensor) -> Tensor:
    """Return the tokens as their first components tell them, float64."""
    return mean_D + (x_TD.double() - mean_D) @ direction_KD.T @ direction_KD


def by_random(x_TD: Tensor, mean_D: Tensor, atom_SD: Tensor, k: int) -> Tensor:
    """Return the tokens as least squares over the ``k`` atoms that each correlates with most tells them, float64."""
    centred_TD = x_TD.double() - mean_D
    chosen_TK = (centred_TD @ atom_SD.T).abs().topk(k, dim=1).indices
    told = []
    for row_D, ids_K in zip(centred_TD, chosen_TK, strict=True):
        basis_DK = atom_SD[ids_K].T
        told.append(basis_DK @ torch.linalg.lstsq(basis_DK, row_D[:, None]).solution[:, 0])
    return mean_D + torch.stack(told)
