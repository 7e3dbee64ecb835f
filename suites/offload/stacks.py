"""Whole models around MoE layers whose experts lie elsewhere: a language model that decodes, and layers alone.

A stack is begun anew (``begin``, which takes the prompt), and then makes one step after another. Imported by workers
only. Shape letters: B sequences, P tokens of a prompt, S steps, T tokens of a call, H hidden, V vocabulary.
"""

from __future__ import annotations

import gc
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Case, Registry
from ...moe.routing import Routing
from ..decoding import cache_name
from ..models import substream
from ..models.smollm2_jobs import ffn_name
from ..quality.passage import take_passage
from ..text import evaluation_text
from .batches import Waiting
from .layers import Layers, source_of


class Stack(Protocol):
    """A model that goes on step by step. ``step`` must be asked for 0, 1, 2 ... after ``begin``."""

    layers: Layers

    def begin(self) -> None:
        """Forget everything and take the prompt."""

    def step(self, step: int) -> Tensor:
        """Return what the head reads after this step, [B, H]."""

    def logits(self, final_BH: Tensor) -> Tensor | None:
        """Return logits_BV float32 of the token that follows, None where there is no head."""


class _Block(nn.Module):
    """Stands where a decoder layer has its FFN."""

    def __init__(self, index: int, layers: Layers) -> None:
        super().__init__()
        self.index, self.run = index, layers

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape of ``x_BTH``."""
        return self.run(self.index, x_BTH.flatten(0, -2)).view_as(x_BTH)


class TextStack:
    """A transformers language model in float32 around the layers; its own FFNs there are let go.

    ``prompt_BP`` are passages of the evaluation text. ``fed`` are the tokens [B] fed at each step: those that follow in
    the text, or, where it is to be generated, what the step before found likeliest when the step was made first.
    """

    def __init__(self, case: Case, registry: Registry, layers: Layers) -> None:
        source: Any = source_of(case, registry)
        self.model, tokenizer = source.language_model()
        self.layers = layers
        for index in layers.bare:
            decoder = self.model.model.layers[index]
            setattr(decoder, ffn_name(decoder), _Block(index, layers))
        gc.collect()
        prompt, steps = int(case.workload["prompt"]), int(case.workload["steps"])
        seeds = [substream(case.seed, "prompt", sequence) for sequence in range(case.tokens)]
        text = evaluation_text()
        ids_BT = torch.stack([take_passage(tokenizer, text, prompt + steps, seed).ids for seed in seeds])
        self.prompt_BP = ids_BT[:, :prompt]
        told = case.workload["feed"] == "text"
        self.fed = list(ids_BT[:, prompt : prompt + steps].unbind(1)) if told else []
        self._cache: Any = None
        self._next_B = self.prompt_BP[:, -1]

    @torch.no_grad()
    def begin(self) -> None:
        """Compute the prompts with an empty cache of keys and values."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        self._next_B = self._forward(self.prompt_BP)[1]

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """Feed the token of ``step``, and return what the head reads then."""
        if step == len(self.fed):
            self.fed.append(self._next_B)
        final_BH, self._next_B = self._forward(self.fed[step][:, None])
        return final_BH

    def _forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.model.model
        output = inner(ids_BT, use_cache=True, **{cache_name(inner): self._cache})
        final_BH: Tensor = output.last_hidden_state[:, -1]
        return final_BH, self.logits(final_BH).argmax(-1)

    @torch.no_grad()
    def logits(self, final_BH: Tensor) -> Tensor:
        """Return logits_BV float32."""
        logits_BV: Tensor = self.model.lm_head(final_BH)
        return logits_BV.float()


class NoiseStack:
    """The layers alone, each added to what it reads: x <- x + layer(rms_norm(x)), begun with gaussian numbers a step.

    The prompt is one call of ``prompt`` tokens for each sequence. A traffic that forces its routing does so at every
    layer and step; with batching, its tokens wait and are put into steps (``batches``).
    """

    def __init__(self, case: Case, registry: Registry, layers: Layers) -> None:
        self.case, self.layers, self.prompt = case, layers, int(case.workload["prompt"])
        self.source = source_of(case, registry)
        self.traffic = registry.get("traffic", case.traffic.name).create(case.traffic.params)
        self.waiting: Waiting | None = None
        if case.workload["batching"] != "none":
            drawn = [self._drawn(case.tokens, step + 1) for step in range(int(case.workload["steps"]))]
            self.waiting = Waiting.of(drawn, case)

    def begin(self) -> None:
        """Pass the prompts through the layers."""
        tokens = self.case.tokens * self.prompt
        self._pass(tokens, 0, self._drawn(tokens, 0) if self.traffic.forced else None)

    def step(self, step: int) -> Tensor:
        """Return what comes out of the last layer, [B, H] float32."""
        forced = None
        if self.waiting is not None:
            forced = self.waiting.batch(step)
        elif self.traffic.forced:
            forced = self._drawn(self.case.tokens, step + 1)
        return self._pass(self.case.tokens, step + 1, forced)

    def logits(self, final_BH: Tensor) -> None:
        """Return None: there is no head."""

    @torch.no_grad()
    def _pass(self, tokens: int, step: int, forced: dict[int, Routing] | None) -> Tensor:
        first = next(iter(self.layers.bare))
        x_TH: Tensor = self.traffic.hidden(self.source, first, tokens, step, self.case.seed)
        self.layers.forced = forced
        for index in self.layers.bare:
            x_TH = x_TH + self.layers(index, nnf.rms_norm(x_TH, x_TH.shape[-1:]))
        return x_TH

    def _drawn(self, tokens: int, step: int) -> dict[int, Routing]:
        """Return what the traffic forces at every layer."""
        found = {}
        for index, bare in self.layers.bare.items():
            spec = bare.spec
            found[index] = self.traffic.routing(tokens, spec.experts, spec.max_k, step, self.case.seed, layer=index)
        return found


def stack_of(case: Case, registry: Registry, layers: Layers) -> Stack:
    """Return the language model around the layers where the model has one and the traffic is its text, else noise."""
    if registry.params("traffic", case.traffic).recorded:
        return TextStack(case, registry, layers)
    return NoiseStack(case, registry, layers)
