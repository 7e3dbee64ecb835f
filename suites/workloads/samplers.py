"""Samplers of a diffusion model that predicts noise: DDIM, PNDM's linear multistep, and the Time-Shift Sampler.

Time-Shift (Li et al. 2024) replaces the time step that the network is told next by the one, within a window, whose
noise level fits the variance that the sample really has. Official code compares with 1 - a (a: signal share), which is
right for data of variance 1; ``data_variance`` adds a times that of the data. PNDM is started by multistep rules of
lower order (as PLMS does) and not by Runge-Kutta.

Shape letters: B samples, D pixels, S time steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_BD, time_B) to predicted noise_BD."""

STEPS = 1000
"""Time steps of training."""

MULTISTEP = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams-Bashforth weights of the newest prediction and those before it, by how many there are."""


def signal_shares(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the signal share of each time step, [S], of a linear schedule from 1e-4 to 0.02."""
    return (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)).cumprod(0).to(dtype)


@dataclass(frozen=True)
class TimeShift:
    """Look for the fitting time step within ``window`` steps around the next one where that is above ``cutoff``."""

    window: int
    cutoff: int
    data_variance: float | None = None

    def shifted(self, x_BD: Tensor, next_time: int, share_S: Tensor) -> Tensor:
        """Return the time step of each sample, int64 [B]."""
        batch = len(x_BD)
        if next_time <= self.cutoff or self.window == 0:
            return torch.full((batch,), next_time)
        half = self.window // 2
        low, high = max(0, next_time - half), min(STEPS - 1, next_time + half)
        near_W = share_S[low : high + 1]
        expected_W = 1 - near_W
        if self.data_variance is not None:
            expected_W = expected_W + near_W * self.data_variance
        variance_B = x_BD.var(dim=1)
        return low + (variance_B[:, None] - expected_W).abs().argmin(1)


def times(steps: int) -> list[int]:
    """Return the time steps of a sampler, falling, evenly spread."""
    return [round(i * (STEPS - 1) / steps) for i in range(steps, 0, -1)]


@torch.no_grad()
def sample(
    network: Network, x_BD: Tensor, steps: int, multistep: bool, shift: TimeShift | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return samples made of noise ``x_BD``, and the time step of each network call.

    Each call's step leads to the next of ``times``, the last to the noiseless image. With a shift the solver's own
    noise level follows the step that the network is told.
    """
    share_S = signal_shares(x_BD.dtype)
    plan = times(steps)
    time_B = torch.full((len(x_BD),), plan[0])
    told: list[Tensor] = []
    past: list[Tensor] = []
    for goal in [*plan[1:], -1]:
        told.append(time_B)
        past = [network(x_BD, time_B), *past[: len(MULTISTEP) - 1 if multistep else 0]]
        noise_BD = combined(past)
        x_BD = moved(x_BD, noise_BD, share_S[time_B][:, None], share_S[goal] if goal >= 0 else share_S.new_ones(()))
        if goal >= 0:
            time_B = shift.shifted(x_BD, goal, share_S) if shift else torch.full_like(time_B, goal)
    return x_BD, told


def combined(past: Sequence[Tensor]) -> Tensor:
    """Return the multistep combination of predictions, newest first."""
    weights = MULTISTEP[len(past) - 1]
    total = weights[0] * past[0]
    for weight, one in zip(weights[1:], past[1:], strict=True):
        total = total + weight * one
    return total


def moved(x_BD: Tensor, noise_BD: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Return the sample at signal share ``after``: the image that the noise implies, with that noise put back."""
    image_BD = (x_BD - (1 - now).sqrt() * noise_BD) / now.sqrt()
    return after.sqrt() * image_BD + (1 - after).sqrt() * noise_BD
