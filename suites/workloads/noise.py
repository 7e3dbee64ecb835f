"""Noise of five colours and the masks that ColorMAE (ECCV 2024) cuts from it: patterns that know nothing of an image.

Red noise is white noise blurred, blue what the blur takes away, green the difference of two blurs, purple what that
takes away. The paper's widths are not known to us; 1 and 2 patches here. Patches with the highest noise are
visible. Shape letters: M patterns of the bank, S their side, B images, L patches, V visible patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .training import generator

NARROW, WIDE = 1.0, 2.0


def blurred(white_MSS: Tensor, width: float) -> Tensor:
    """Return ``white_MSS`` convolved with a Gaussian of standard deviation ``width``, wrapped around its edges."""
    side = white_MSS.shape[-1]
    frequency = torch.fft.fftfreq(side)
    squared = frequency[:, None] ** 2 + frequency[None] ** 2
    gain = torch.exp(-2 * torch.pi**2 * width**2 * squared)
    found: Tensor = torch.fft.ifft2(torch.fft.fft2(white_MSS) * gain).real
    return found


def bank(colour: str, patterns: int, side: int, seed: int) -> Tensor:
    """Return noise [M, S, S] of one colour, each pattern with mean 0 and standard deviation 1."""
    white = torch.randn(patterns, side, side, generator=generator(seed, "noise"))
    green = blurred(white, NARROW) - blurred(white, WIDE)
    found = {
        "white": white,
        "red": blurred(white, NARROW),
        "green": green,
        "blue": white - blurred(white, NARROW),
        "purple": white - green,
    }[colour]
    return (found - found.mean((1, 2), keepdim=True)) / found.std((1, 2), keepdim=True)


def spectrum(noise_MSS: Tensor) -> Tensor:
    """Return the share of power at each whole radius of frequency up to S / 2, averaged over patterns."""
    side = noise_MSS.shape[-1]
    power = torch.fft.fft2(noise_MSS).abs().square().mean(0)
    index = torch.fft.fftfreq(side) * side
    radius = (index[:, None] ** 2 + index[None] ** 2).sqrt().round().long()
    found = torch.zeros(side).index_add(0, radius.flatten(), power.flatten())[: side // 2 + 1]
    return found / found.sum()


def spectral_gap(banks: dict[str, Tensor]) -> float:
    """Return how many of six statements about the colours' spectra do not hold.

    Red has its power lower than white and blue higher; green has it in a band, of which purple has less than white;
    white's density is even.
    """
    shares = {colour: spectrum(noise) for colour, noise in banks.items()}
    radius = torch.arange(len(shares["white"])).float()
    centre = {colour: float((share * radius).sum()) for colour, share in shares.items()}
    impulse = torch.zeros_like(banks["white"][:1])
    impulse[0, 0, 0] = 1.0  # equal power at every frequency: how many of them each radius has
    count = spectrum(impulse)
    density = {colour: share / count for colour, share in shares.items()}
    peak = int(density["green"].argmax())
    held = (
        centre["red"] < centre["green"] < centre["white"],
        centre["white"] < centre["blue"],
        0 < peak < len(radius) - 1,
        bool(density["green"][-1] < 0.1 * density["green"][peak]),
        bool(density["purple"][peak] < 0.8 * density["white"][peak]),
        bool((density["white"][1:] - 1).abs().max() < 0.2),
    )
    return float(sum(not one for one in held))


class ColourMask:
    """The visible patches of a batch by noise of one colour: crops of the bank, turned over at random."""

    def __init__(self, colour: str, patterns: int, side: int, visible: int, seed: int) -> None:
        self.bank_MSS = bank(colour, patterns, 4 * side, seed)
        self.side, self.visible, self.seed = side, visible, seed

    def __call__(self, images: Tensor, step: int | str) -> Tensor:
        """Return the visible patches of each image, int64 [B, V], rising; only how many images there are matters."""
        rng = generator(self.seed, "mask", step)
        count, side, room = len(images), self.side, self.bank_MSS.shape[-1] - self.side + 1
        which, row, column = (torch.randint(high, (count,), generator=rng) for high in (len(self.bank_MSS), room, room))
        offset = torch.arange(side)
        flip = torch.randint(2, (2, count, 1), generator=rng).bool()
        rows, columns = (
            start[:, None] + torch.where(turned, side - 1 - offset, offset)
            for start, turned in ((row, flip[0]), (column, flip[1]))
        )
        crop_BSS = self.bank_MSS[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        return crop_BSS.flatten(1).topk(self.visible, dim=-1).indices.sort(-1).values


def lonely_share(visible_BV: Tensor, side: int) -> float:
    """Return the share of masked patches without a visible neighbour above, below, left or right."""
    visible = torch.zeros(len(visible_BV), side * side, dtype=torch.bool).scatter_(1, visible_BV, True)
    grid = torch.nn.functional.pad(visible.view(-1, side, side), (1, 1, 1, 1))
    near = grid[:, :-2, 1:-1] | grid[:, 2:, 1:-1] | grid[:, 1:-1, :-2] | grid[:, 1:-1, 2:]
    masked = ~visible.view(-1, side, side)
    return float((masked & ~near).sum() / masked.sum())
