"""AdvMoE (arXiv 2308.10110): a residual network looks at the image and picks one expert for all layers.

How router and experts are trained against each other's attacks is a recipe. Shape letters: T tokens, S samples,
E expert ids, C and D channels, R rows and W columns of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import One, RouterBundle, TopK, seeded_normal
from ..router_context import ContextPipeline, OncePerModel, features_per_token
from ..routing import Context

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.sample import AdvMoE
    from ..shapes import ModelShape

CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class StraightThrough(One):
    """Weight 1, with the gradient of the selected score: w = 1 + z - z without the gradient of the last."""

    def unscaled(self, scores_TK: Tensor) -> Tensor:
        """Return ones that pass their gradient on to the scores."""
        return scores_TK - scores_TK.detach() + 1


@dataclass(frozen=True)
class StraightThroughMask(StraightThrough):
    """Weight 1 for the first slot, the best, and 0 for the others; every weight passes its gradient on."""

    def unscaled(self, scores_TK: Tensor) -> Tensor:
        """Return the mask of the best."""
        best_K = torch.arange(scores_TK.shape[1], device=scores_TK.device) == 0
        return scores_TK - scores_TK.detach() + best_K.to(scores_TK.dtype)


class Convolution(nn.Module):
    """A 3 x 3 convolution without bias, then batch normalisation."""

    def __init__(self, weight_DC33: Tensor, stride: int = 1) -> None:
        super().__init__()
        self.weight_DC33 = nn.Parameter(weight_DC33)
        self.norm = nn.BatchNorm2d(len(weight_DC33))
        self.stride = stride

    def forward(self, x_SCRW: Tensor) -> Tensor:
        """Return [S, D, R / stride, W / stride]."""
        y_SDRW: Tensor = self.norm(nnf.conv2d(x_SCRW, self.weight_DC33, stride=self.stride, padding=1))
        return y_SDRW


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters, which drops pixels and pads channels with zeros."""

    def __init__(self, first: Convolution, second: Convolution) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x_SCRW: Tensor) -> Tensor:
        """Return [S, D, R / stride, W / stride]."""
        y_SDRW: Tensor = self.second(nnf.relu(self.first(x_SCRW)))
        extra = y_SDRW.shape[1] - x_SCRW.shape[1]
        thinned_SCRW = x_SCRW[:, :, :: self.first.stride, :: self.first.stride]
        return nnf.relu(y_SDRW + nnf.pad(thinned_SCRW, (0, 0, 0, 0, extra // 2, extra - extra // 2)))


class ImageScores(nn.Module):
    """z = network(image of the token's sample); batch normalisation uses the batch in training only.

    Whether it trains is for the Context to say; each training call moves the running statistics, as elsewhere.
    """

    def __init__(self, experts: int, blocks: int, seed: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layers(blocks, seed))
        self.head_EC = nn.Parameter(seeded_normal((experts, CHANNELS[-1]), CHANNELS[-1] ** -0.5, seed, "advmoe.head"))

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return logits_TE float32; only the number of tokens is read from ``x_TH``."""
        images_S3RW, segment_T = features_per_token(ctx, len(x_TH))
        if images_S3RW.dim() != 4 or images_S3RW.shape[1] != 3:
            found = tuple(images_S3RW.shape)
            raise ValueError(f"the Context's 'features' are {found}; give images [S, 3, rows, columns].")
        self.train(ctx.training)
        pooled_SC = self.body(images_S3RW.float()).mean((2, 3))
        return nnf.linear(pooled_SC, self.head_EC)[segment_T]


def _layers(blocks: int, seed: int) -> Iterator[nn.Module]:
    """Yield the first convolution, then the blocks; each stage but the first halves the image."""
    yield _convolution(3, CHANNELS[0], 1, seed, "first")
    yield nn.ReLU()
    incoming = CHANNELS[0]
    for stage, channels in enumerate(CHANNELS):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            name = f"{stage}.{block}"
            yield BasicBlock(
                _convolution(incoming, channels, stride, seed, f"{name}.first"),
                _convolution(channels, channels, 1, seed, f"{name}.second"),
            )
            incoming = channels


def _convolution(incoming: int, outgoing: int, stride: int, seed: int, name: str) -> Convolution:
    """Return a seeded convolution with variance 2 / fan-in."""
    std = (2 / (9 * incoming)) ** 0.5
    return Convolution(seeded_normal((outgoing, incoming, 3, 3), std, seed, f"advmoe.{name}"), stride)


def build(params: AdvMoE) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory; every layer gets a router, and that of the first decides for all."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        scorer = ImageScores(shape.experts, params.blocks, seed)
        weighter = StraightThroughMask() if params.released_mask else StraightThrough()
        router = ContextPipeline(scorer, TopK(params.max_k(shape)), weighter, {"features", "segment_T"})
        return RouterBundle(OncePerModel(router), params.kinds(shape))

    return factory
