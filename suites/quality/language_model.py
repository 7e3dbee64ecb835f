"""A transformers model with some of its FFNs exchanged, run from the first layer that changes.

What lies before that layer is the same for every method, so the dense model's residual stream at its input is computed
once, kept in the cache, and every method begins there: the same operations on the same numbers as a whole forward
pass. Models are of the LLaMA kind: ``model.model.layers`` with an FFN or MoE block each, and ``model.lm_head``.

Shape letters: T tokens of one window, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import Case, MoebenchError, make_key
from ..digest import sha256_of
from ..models import ModelSource, cache_dir
from ..models.cache import make_once
from ..models.smollm2_jobs import ffn_name, ffn_of
from ..models.tensors import read_checked, save_checked

_MODELS: dict[str, tuple[Any, Any]] = {}


def language_model(case: Case, source: ModelSource) -> tuple[Any, Any]:
    """Return (model, tokenizer), loaded once per worker."""
    if not hasattr(source, "language_model"):
        raise MoebenchError(f"model '{case.model}' has no language model around its layers; use model=smollm2.")
    if case.weights_sha256 not in _MODELS:
        _MODELS[case.weights_sha256] = source.language_model()
    return _MODELS[case.weights_sha256]


@dataclass(frozen=True)
class DenseStates:
    """What the dense model makes of a text, window by window: all [tokens, H] float32.

    ``entering`` is the residual stream at the input of decoder layer ``first``; ``final`` is what the head reads;
    ``reading`` is what the FFNs of later layers that change read.
    """

    first: int
    entering: Tensor
    final: Tensor
    reading: Mapping[int, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def exchanged(model: Any, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put ``blocks`` in the place of the FFNs of their layers until the block ends; the very modules come back."""
    layers = model.model.layers
    originals = {index: ffn_of(layers[index]) for index in blocks}
    try:
        for index, block in blocks.items():
            setattr(layers[index], ffn_name(layers[index]), block)
        yield
    finally:
        for index, original in originals.items():
            setattr(layers[index], ffn_name(layers[index]), original)


@torch.no_grad()
def forward_from(model: Any, first: int, entering_TH: Tensor) -> Tensor:
    """Return what the head reads, [T, H], from the residual stream at the input of decoder layer ``first``."""
    decoder = model.model
    whole = decoder.layers
    decoder.layers = whole[first:]
    try:
        final_TH: Tensor = decoder(inputs_embeds=entering_TH[None], use_cache=False).last_hidden_state[0]
    finally:
        decoder.layers = whole
    return final_TH


def dense_states(
    model: Any, weights_sha256: str, ids: Tensor, window: int, first: int, later: Sequence[int] = ()
) -> DenseStates:
    """Return the states of the dense model on ``ids`` [tokens], made once per text, window, first and later layers."""
    import transformers

    versions = [torch.__version__, transformers.__version__]
    key = make_key([weights_sha256, sha256_of(ids), window, first, *([list(later)] if later else []), versions])
    file = make_once(
        cache_dir() / "quality" / f"{key[:32]}.safetensors",
        lambda target: _record(model, ids, window, first, later, target),
    )
    tensors = read_checked(file)
    reading = {index: tensors[f"reading.{index}"] for index in later}
    return DenseStates(first, tensors["entering"], tensors["final"], reading)


@torch.no_grad()
def _record(model: Any, ids: Tensor, window: int, first: int, later: Sequence[int], target: Path) -> None:
    caught: dict[str, list[Tensor]] = {"entering": [], "final": []}
    layers = model.model.layers
    hooks = [layers[first].register_forward_pre_hook(_into(caught["entering"]))]
    for index in later:
        caught[f"reading.{index}"] = []
        hooks.append(ffn_of(layers[index]).register_forward_pre_hook(_into(caught[f"reading.{index}"])))
    try:
        for part in torch.split(ids, window):
            caught["final"].append(model.model(part[None], use_cache=False).last_hidden_state[0])
    finally:
        for hook in hooks:
            hook.remove()
    save_checked({name: torch.cat(parts).contiguous() for name, parts in caught.items()}, target)


def _into(parts: list[Tensor]) -> Callable[[Any, Any], None]:
    return lambda module, inputs: parts.append(inputs[0][0].clone())
