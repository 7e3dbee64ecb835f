"""What a stage of a recipe made, as an artefact and back: weights and packed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..contracts import Scheme
from .artefacts import Artefact
from .experts import ExpertStore, QTensor
from .layer import LayerWeights, SharedExpert
from .quantization import parts_of, tensor_of

SHARED_TENSORS = ("gate_up", "down", "gate_H", "mix_2H")
"""The tensors of a SharedExpert; the last two may be None."""

WEIGHTS = ("gate_up", "down", "router_EH", "router_bias_E", "input_scale_H")
"""The tensors of a LayerWeights besides; the last three may be None."""


def weights_artefact(weights: LayerWeights) -> Artefact:
    """Return all tensors of ``weights`` by name, and what else it says."""
    named = {name: getattr(weights, name) for name in WEIGHTS}
    meta: dict[str, Any] = {"activation": weights.activation, "gated": weights.gated, "heads": weights.heads}
    if weights.shared is not None:
        named |= {f"shared.{name}": getattr(weights.shared, name) for name in SHARED_TENSORS}
        meta["shared"] = {"activation": weights.shared.activation, "gated": weights.shared.gated}
    return Artefact({name: tensor for name, tensor in named.items() if tensor is not None}, meta)


def weights_of(artefact: Artefact) -> LayerWeights:
    """Return the LayerWeights of ``weights_artefact``."""
    values: dict[str, Any] = {name: t for name, t in artefact.tensors.items() if not name.startswith("shared.")}
    values |= artefact.meta
    shared = values.pop("shared", None)
    if shared is not None:
        parts: dict[str, Any] = {name: artefact.tensors.get(f"shared.{name}") for name in SHARED_TENSORS}
        values["shared"] = SharedExpert(**parts, **shared)
    return LayerWeights(**values)


def quantized_artefact(store: ExpertStore) -> Artefact | None:
    """Return the packed bytes of every expert; None where a plug-in's own codes are not ours to write."""
    if isinstance(store.gate_up, Tensor) or isinstance(store.down, Tensor):
        return None
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for name, weights in (("gate_up", store.gate_up), ("down", store.down)):
        for slot, weight in enumerate(weights):
            parts = parts_of(weight)
            if parts is None:
                return None
            tensors |= {f"{name}.{slot}.{part}": tensor for part, tensor in parts.items()}
        meta[name] = [{"scheme": weight.scheme, "shape": weight.shape} for weight in weights]
    return Artefact(tensors, meta)


def quantized_of(store: ExpertStore, artefact: Artefact) -> ExpertStore:
    """Return ``store`` with the weights of ``quantized_artefact``."""

    def weight(place: str, told: Mapping[str, Any]) -> QTensor:
        parts = {key.removeprefix(place): t for key, t in artefact.tensors.items() if key.startswith(place)}
        rows, columns = told["shape"]
        return tensor_of(parts, Scheme(**told["scheme"]), (rows, columns))

    def weights(name: str) -> tuple[QTensor, ...]:
        return tuple(weight(f"{name}.{slot}.", told) for slot, told in enumerate(artefact.meta[name]))

    return replace(store, gate_up=weights("gate_up"), down=weights("down"))
