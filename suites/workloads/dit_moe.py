"""Workload ``dit_moe``: samplers with and without a time shift, and what the experts of a DiT-MoE know.

``fd_pixel`` is a Fréchet distance of raw pixels and never FID. Shape letters: B images, L patches, D pixels, S steps of
the sampler, N assignments, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...contracts import Metric, Series, plain
from ..digits import digits_sha256
from ..workload_plugins import DiTMoE
from . import diffusion, digits, samplers, transformer
from .base import Identity, Report, checked
from .diffusion import PATCHES, NoiseTask, scaled
from .digits import CLASSES, fd_pixel, split
from .information import expert_information
from .samplers import TimeShift, sample, signal_shares, times
from .training import generator, schedule, trained
from .transformer import routings

EXACT = 1e-8
"""How far a sampler that is told the true noise may end from the image, in float64."""


class DiTMoEWorkload:
    """The model, its samples, and its routing over a sampler's steps."""

    def __init__(self, params: DiTMoE, seed: int) -> None:
        self.params, self.seed = params, seed
        self.task = NoiseTask(params, seed)
        (self.images, _), (self.held_out, _) = split(seed)

    def train(self) -> float:
        """Train the model."""
        settings = schedule(self.params.steps, 2e-3, self.seed, weight_decay=0.0)
        sampling = {"sampler", "sampler_steps", "window", "cutoff", "data_variance", "samples", "traced"}
        params = {name: value for name, value in plain(self.params).items() if name not in sampling}
        identity = {"name": "dit_moe", "params": params, "seed": self.seed, "digits": digits_sha256()}
        modules = (diffusion, digits, samplers, transformer)
        return trained(self.task, settings, identity, modules)

    def measure(self) -> Report:
        """Return distances of samples with and without the shift, and mutual information of experts."""
        variance = float(scaled(self.images).var(dim=1).mean()) if self.params.data_variance else None
        shift = TimeShift(self.params.window, self.params.cutoff, variance)
        plain, _, class_B = self._samples(None)
        own, told, _ = self._samples(shift)
        metrics = [
            Metric("fd_pixel", self._distance(plain), "1", n=len(plain)),
            Metric("fd_pixel_shifted", self._distance(own), "1", n=len(own)),
            Metric("fd_pixel_floor", self._floor(), "1"),
            Metric("shifted_calls", moved_share(told), "1"),
            Metric("mean_shift", mean_shift(told), "steps"),
        ]
        found, series = self._experts(class_B)
        return Report(checked(self._identities(shift)), (*metrics, *found), tuple(series))

    # --- samples ------------------------------------------------------------------------------------------------------

    def _samples(self, shift: TimeShift | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return samples_BD, the time steps of the calls, and classes, from the same noise whatever the shift."""
        rng = generator(self.seed, "dit_moe", "samples")
        class_B = torch.arange(self.params.samples) % CLASSES
        noise_BD = torch.randn(self.params.samples, self.images[0].numel(), generator=rng)
        model = self.task.model
        multistep = self.params.sampler == "pndm"
        found, told = sample(
            lambda x, time: model(x, time, class_B), noise_BD, self.params.sampler_steps, multistep, shift
        )
        return found, told, class_B

    def _distance(self, sample_BD: Tensor) -> float:
        """Return the distance of samples, cut to the range of pixels, from all real images."""
        return fd_pixel(sample_BD.clamp(-1, 1), scaled(torch.cat([self.images, self.held_out])))

    def _floor(self) -> float:
        """Return the distance of a random half of the real images from the other half."""
        real_BD = scaled(torch.cat([self.images, self.held_out]))
        order = torch.randperm(len(real_BD), generator=generator(self.seed, "dit_moe", "halves"))
        half = len(order) // 2
        return fd_pixel(real_BD[order[:half]], real_BD[order[half:]])

    # --- experts ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _experts(self, class_B: Tensor) -> tuple[list[Metric], list[Series]]:
        """Return the mutual information of expert with patch, step and class over one sampling, and shares by step.

        The plain sampler runs once more with the first ``traced`` samples.
        """
        chosen: list[list[Tensor]] = [[] for _ in self.task.model.blocks]
        few_B = class_B[: self.params.traced]
        noise_BD = torch.randn(len(few_B), self.images[0].numel(), generator=generator(self.seed, "dit_moe", "trace"))

        def watched(x_BD: Tensor, time_B: Tensor) -> Tensor:
            noise: Tensor = self.task.model(x_BD, time_B, few_B)
            for layer, routing in enumerate(routings(self.task.model)):
                chosen[layer].append(routing.expert_N.view(len(few_B), PATCHES, -1))
            return noise

        sample(watched, noise_BD, self.params.sampler_steps, self.params.sampler == "pndm")
        expert_LSBTK = torch.stack([torch.stack(steps) for steps in chosen])
        return expert_information(expert_LSBTK, few_B, self.params.experts, self.seed)

    # --- identities ---------------------------------------------------------------------------------------------------

    def _identities(self, shift: TimeShift) -> list[Identity]:
        image_BD = scaled(self.held_out[:8]).double()
        noise_BD = torch.randn(image_BD.shape, dtype=torch.float64, generator=generator(self.seed, "dit_moe", "known"))
        share = signal_shares(torch.float64)[times(self.params.sampler_steps)[0]]
        start_BD = share.sqrt() * image_BD + (1 - share).sqrt() * noise_BD
        known = []
        for multistep in (False, True):
            found, _ = sample(lambda x, time: noise_BD, start_BD, self.params.sampler_steps, multistep)
            name = f"{'multistep' if multistep else 'one-step'} sampler with the true noise"
            known.append(Identity(name, float((found - image_BD).abs().max()), EXACT))
        still = [sample(self._zero, start_BD, 5, True, one)[0] for one in (None, replace(shift, window=0))]
        real_BD = scaled(self.held_out)
        return [
            *known,
            Identity("shift in a window of 0", float((still[0] - still[1]).abs().max())),
            Identity("distance of images from themselves", abs(fd_pixel(real_BD, real_BD)), EXACT),
            Identity("distance of images from brighter ones", abs(fd_pixel(real_BD, real_BD + 0.5) - 16.0), 1e-5),
        ]

    def _zero(self, x_BD: Tensor, time_B: Tensor) -> Tensor:
        return torch.zeros_like(x_BD)


def moved_share(told: list[Tensor]) -> float:
    """Return the share of network calls that were told another time step than the plan's."""
    plan = torch.tensor(times(len(told)))
    return float((torch.stack(told) != plan[:, None]).double().mean())


def mean_shift(told: list[Tensor]) -> float:
    """Return by how many time steps calls were shifted on average, signs kept."""
    plan = torch.tensor(times(len(told)))
    return float((torch.stack(told) - plan[:, None]).double().mean())
