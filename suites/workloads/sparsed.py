"""Workload ``sparsed``: block-sparse attention whose mask is made once and reused over later steps (SparseD).

Shape letters: S steps, L layers, B sequences, A heads, T tokens, D head width, N blocks, K kept blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...contracts import Metric
from ..workload_plugins import SparseD
from . import masked_diffusion, text_bytes, transformer
from .base import Identity, Report, checked, mean
from .block_attention import as_mask, importance, jaccard, masked_attention, select, sparse_attention
from .masked_diffusion import MaskedTask, generate
from .text_bytes import symbols, text_sha256, windows
from .training import generator, schedule, trained
from .transformer import Core, full

EXACT = 1e-10
"""How far gathered blocks may be from a dense mask in float64."""


@dataclass
class Recorder:
    """Full attention that writes down the kept blocks; ``found`` has those of each step and layer, [B, A, N, K]."""

    params: SparseD
    found: list[list[Tensor]] = field(default_factory=list)

    def cores(self, step: int) -> Sequence[Core]:
        """Return the attention of every layer at one step."""
        self.found.append([])
        return [self._core] * self.params.depth

    def _core(self, q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
        params = self.params
        blocks = importance(q_BATD, k_BATD, params.block)
        self.found[-1].append(select(blocks, params.prompt // params.block, params.select))
        return full(q_BATD, k_BATD, v_BATD)


class SparseDWorkload:
    """The model, and generations with full, reused and random masks."""

    def __init__(self, params: SparseD, seed: int) -> None:
        self.params, self.seed = params, seed
        self.task = MaskedTask(params, seed)

    def train(self) -> float:
        """Train the model."""
        settings = schedule(self.params.steps, 6e-3, self.seed)
        identity = {"name": "sparsed", "params": self.params, "seed": self.seed, "text": text_sha256()}
        modules = (masked_diffusion, text_bytes, transformer)
        return trained(self.task, settings, identity, modules)

    def measure(self) -> Report:
        """Return the overlap of masks between steps and heads, and how many tokens stay as with full attention."""
        params = self.params
        prompts = windows(symbols(True), params.prompts, params.prompt, generator(self.seed, "sparsed", "prompts"))
        recorder = Recorder(params)
        reference = self._generate(prompts, recorder.cores)
        first = math.floor(params.diffusion_steps * params.skip)
        ways = {
            "after_skip": (first, recorder.found[first]),
            "from_start": (0, recorder.found[0]),
            "random_after_skip": (first, self._random(recorder.found[0], "after")),
            "random_from_start": (0, self._random(recorder.found[0], "start")),
        }
        agreement = {name: self._agreement(prompts, reference, since, blocks) for name, (since, blocks) in ways.items()}
        figures = {**overlaps(recorder.found, first), **self._costs(recorder.found[0], first)}
        figures["overlap_chance"] = chance(ways["random_after_skip"][1], ways["random_from_start"][1])
        metrics = [
            Metric("generated_symbols", symbols_of(reference[:, params.prompt :]), "1", n=len(reference)),
            *(Metric(f"agreement_{name}", value, "1", n=reference.numel()) for name, value in agreement.items()),
            *(Metric(name, value, "1") for name, value in figures.items()),
        ]
        return Report(checked(self._identities()), tuple(metrics))

    def _generate(self, prompts: Tensor, cores: masked_diffusion.CoresOf) -> Tensor:
        return generate(self.task.model, prompts, self.params.tokens, self.params.diffusion_steps, cores)

    def _agreement(self, prompts: Tensor, reference: Tensor, since: int, blocks: Sequence[Tensor]) -> float:
        """Return the share of generated tokens as in ``reference``, with ``blocks`` of each layer after step ``since``.

        The mask is made in step ``since``, which is itself still full; from the start means that no step is full.
        """
        sparse = [partial(sparse_attention, blocks_BANK=one) for one in blocks]
        dense: list[Core] = [full] * self.params.depth
        found = self._generate(prompts, lambda step: dense if since > 0 and step <= since else sparse)
        return float((found == reference)[:, self.params.prompt :].double().mean())

    def _random(self, like: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return as many blocks of prompt and rest for every query block, drawn at random."""
        prompt = self.params.prompt // self.params.block
        rng = generator(self.seed, "sparsed", "random", name)
        noise = [torch.rand(*one.shape[:-1], one.shape[-2], generator=rng) for one in like]
        return [select(one, prompt, self.params.select) for one in noise]

    def _costs(self, blocks: Sequence[Tensor], first: int) -> dict[str, float]:
        """Return the share of blocks that a sparse step attends to, and that of a whole generation."""
        share = blocks[0].shape[-1] / blocks[0].shape[-2]
        full_steps = (first + 1) / self.params.diffusion_steps
        return {"kept_blocks": share, "attention_work": full_steps + (1 - full_steps) * share}

    def _identities(self) -> list[Identity]:
        """Return how far gathered blocks are from a dense mask, and from full attention where all are kept."""
        rng = generator(self.seed, "sparsed", "identity")
        params = self.params
        q, k, v = torch.randn(3, 2, params.heads, params.tokens, 8, dtype=torch.float64, generator=rng)
        blocks = select(importance(q, k, params.block), params.prompt // params.block, params.select)
        everything = torch.arange(blocks.shape[-2]).expand(*blocks.shape[:-1], -1)
        gap = (sparse_attention(q, k, v, blocks) - masked_attention(q, k, v, blocks)).abs().max()
        whole = (sparse_attention(q, k, v, everything) - full(q, k, v)).abs().max()
        return [
            Identity("gathered blocks against a dense mask", float(gap), EXACT),
            Identity("all blocks gathered against full attention", float(whole), EXACT),
        ]


def symbols_of(generated_BT: Tensor) -> float:
    """Return how many different symbols a sequence has, mean over sequences: of 1 no mask can be seen to cost any."""
    return mean(float(len(row_T.unique())) for row_T in generated_BT)


def overlaps(found: Sequence[Sequence[Tensor]], first: int) -> dict[str, float]:
    """Return mean Jaccard overlaps of masks: of a head in the mask's own step ``first`` and each later one, and of two
    heads of a layer in one step."""
    masks = torch.stack(
        [torch.stack([as_mask(layer) for layer in step]) for step in found[first:]]
    )  # [S, L, B, A, N, N]
    steps = jaccard(masks[:1], masks[1:])
    next_steps = jaccard(masks[:-1], masks[1:])
    heads = masks.shape[3]
    pairs = [(a, b) for a in range(heads) for b in range(a + 1, heads)]
    across = [float(jaccard(masks[:, :, :, a], masks[:, :, :, b]).mean()) for a, b in pairs]
    return {
        "overlap_steps": float(steps.mean()),
        "overlap_last_step": float(steps[-1].mean()),
        "overlap_next_step": float(next_steps.mean()),
        "overlap_heads": mean(across),
    }


def chance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the mean overlap of two random choices of blocks, layer by layer, made as the masks are: of the prompt
    and of the rest each so many, which is more than two choices among all blocks would have."""
    return mean(float(jaccard(as_mask(a), as_mask(b)).mean()) for a, b in zip(first, second, strict=True))
