"""A masked-diffusion language model over single bytes: trained to fill masks, generating by unmasking step by step.

After LLaDA (arXiv 2502.09992): a share t ~ U(0, 1) of the symbols is masked, the loss of masked symbols weighs 1/t, and
generation fixes the symbols of which the model is surest. Queries and keys are turned by their places: with
places as vectors of their own, a model so small learned how often bytes occur and no context at all.

Shape letters: B sequences, A heads, T symbols, D head width, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..models import substream
from ..workload_plugins import SparseD
from .text_bytes import SYMBOLS, symbols, windows
from .training import generator
from .transformer import Block, Core, balance, full, routings

MASK = SYMBOLS
"""The id of the mask, after those of the text."""


class MaskedModel(nn.Module):
    """A bidirectional MoE transformer that sees its neighbours on both sides."""

    def __init__(self, params: SparseD) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, params.hidden)
        self.layers = nn.ModuleList(
            Block(params.hidden, params.heads, params.width, params.experts, params.k) for _ in range(params.depth)
        )
        self.norm = nn.RMSNorm(params.hidden, eps=1e-6)
        self.head = nn.Linear(params.hidden, SYMBOLS, bias=False)

    def forward(self, ids_BT: Tensor, cores: Sequence[Core] | None = None) -> Tensor:
        """Return logits_BTV; ``cores`` has the attention of each layer, full where there is none."""
        x_BTH = self.embed(ids_BT)
        for number, layer in enumerate(self.layers):
            core = full if cores is None else cores[number]
            x_BTH = layer(x_BTH, by_distance(core))
        logits_BTV: Tensor = self.head(self.norm(x_BTH))
        return logits_BTV


def by_distance(core: Core) -> Core:
    """Return ``core`` on queries and keys that are turned by their places."""

    def found(q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
        return core(turned(q_BATD), turned(k_BATD), v_BATD)

    return found


def turned(x_BATD: Tensor) -> Tensor:
    """Return queries or keys turned by their places (RoPE, arXiv 2104.09864): products know distances alone."""
    half = x_BATD.shape[-1] // 2
    rate = torch.exp(-math.log(1e3) * torch.arange(half) / half)
    angle = torch.arange(x_BATD.shape[2])[:, None] * rate
    a, b = x_BATD.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class MaskedTask:
    """Fill the masks of windows of the calibration half."""

    def __init__(self, params: SparseD, seed: int) -> None:
        torch.manual_seed(substream(seed, "sparsed", "weights"))
        self.model: MaskedModel = MaskedModel(params)
        self.params, self.seed = params, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids_BT of 8 windows and the share t_B of each that is masked."""
        rng = generator(self.seed, "sparsed", "batch", step)
        ids_BT = windows(symbols(False), 8, self.params.tokens, rng)
        return ids_BT, torch.rand(len(ids_BT), generator=rng).clamp_min(0.05)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the weighted loss of masked symbols plus balance; which are masked follows from the step's seed."""
        ids_BT, share_B = batch
        masked_BT = torch.rand(ids_BT.shape) < share_B[:, None]
        logits_BTV = self.model(ids_BT.masked_fill(masked_BT, MASK))
        nll_BT = nnf.cross_entropy(logits_BTV.transpose(1, 2), ids_BT, reduction="none")
        loss = (nll_BT * masked_BT / share_B[:, None]).mean()
        return loss + balance(routings(self.model)), {"loss": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Nothing is watched while it trains."""
        return {}


CoresOf = Callable[[int], Sequence[Core]]
"""The attention of every layer at a step."""


@torch.no_grad()
def generate(model: MaskedModel, prompt_BT: Tensor, tokens: int, steps: int, cores: CoresOf) -> Tensor:
    """Return ids_BT [B, tokens]: the prompt, and the rest filled in over ``steps`` steps, the surest first.

    Nothing is random. Each step fixes the same number of symbols, the last ones what is left.
    """
    batch, given = prompt_BT.shape
    ids_BT = torch.full((batch, tokens), MASK)
    ids_BT[:, :given] = prompt_BT
    for step in range(steps):
        open_BT = ids_BT == MASK
        confidence_BT, best_BT = model(ids_BT, cores(step)).softmax(-1).max(-1)
        count = int(open_BT[0].sum()) // (steps - step)
        surest = confidence_BT.masked_fill(~open_BT, -1.0).topk(count, dim=-1).indices
        ids_BT.scatter_(1, surest, best_BT.gather(1, surest))
    return ids_BT
