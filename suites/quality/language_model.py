"""A transformers model with some of its FFNs exchanged, run from the first layer that changes.

What lies before that layer is the same for every method, so the dense model's residual stream at its input is computed
once, kept in the cache, and every method begins there: the same operations on the same numbers as a whole forward
pass. Models are of the LLaMA kind: ``model.model.layers[i].mlp``, ``model.model.norm`` and ``model.lm_head``.

Shape letters: T tokens of one window, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import make_key
from ..digest import sha256_of
from ..models import cache_dir
from ..models.cache import make_once
from ..models.tensors import read_checked, save_checked


@dataclass(frozen=True)
class DenseStates:
    """What the dense model makes of a text, window by window: all [tokens, H] float32.

    ``entering`` is the residual stream at the input of decoder layer ``first``; ``final`` is what the head reads.
    """

    first: int
    entering: Tensor
    final: Tensor


@contextlib.contextmanager
def exchanged(model: Any, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put ``blocks`` in the place of the FFNs of their layers until the block ends; the very modules come back."""
    layers = model.model.layers
    originals = {index: layers[index].mlp for index in blocks}
    try:
        for index, block in blocks.items():
            layers[index].mlp = block
        yield
    finally:
        for index, original in originals.items():
            layers[index].mlp = original


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


def dense_states(model: Any, weights_sha256: str, ids: Tensor, window: int, first: int) -> DenseStates:
    """Return the states of the dense model on ``ids`` [tokens], made once per text, window and first layer."""
    import transformers

    versions = [torch.__version__, transformers.__version__]
    key = make_key([weights_sha256, sha256_of(ids), window, first, versions])
    file = make_once(
        cache_dir() / "quality" / f"{key[:32]}.safetensors", lambda target: _record(model, ids, window, first, target)
    )
    tensors = read_checked(file)
    return DenseStates(first, tensors["entering"], tensors["final"])


@torch.no_grad()
def _record(model: Any, ids: Tensor, window: int, first: int, target: Path) -> None:
    entering: list[Tensor] = []
    final: list[Tensor] = []
    hook = model.model.layers[first].register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0][0]))
    try:
        for part in torch.split(ids, window):
            final.append(model.model(part[None], use_cache=False).last_hidden_state[0])
    finally:
        hook.remove()
    save_checked({"entering": torch.cat(entering).contiguous(), "final": torch.cat(final).contiguous()}, target)
