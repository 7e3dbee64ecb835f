"""Recipes: structure, then quantization, then routing, then sparsity, each calibrated on the result so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contracts import Case, Descriptor, Registry, Scheme, load_attribute, make_key
from .artefacts import Artefact, cached, sources_sha256, tensors_sha256
from .channel_artefacts import sparsified, sparsity_artefact, sparsity_of
from .channels import Sparsity
from .experts import Constants, ExpertStore, QTensor
from .layer import LayerWeights, PreparedLayer, SharedExpert
from .quantization import Seen, parts_of, tensor_of
from .shapes import ModelShape
from .stand_ins import StandIns, alone

SHARED_TENSORS = ("gate_up", "down", "gate_H", "mix_2H")
"""The tensors of a SharedExpert; the last two may be None."""


class Stage(NamedTuple):
    """One step of a recipe: a plug-in and its checked parameters."""

    descriptor: Descriptor
    params: Any

    def create(self) -> Any:
        """Return what the plug-in's factory makes of the parameters."""
        return load_attribute(self.descriptor.factory)(self.params)

    def identity(self) -> dict[str, Any]:
        """Return what tells this step from another: name, version, parameters, and the sources behind it."""
        return {
            "name": self.descriptor.name,
            "version": self.descriptor.version,
            "params": self.params,
            "sources": sources_sha256(self.descriptor.factory),
        }


@dataclass(frozen=True)
class Recipe:
    """How a layer of a model becomes the layer under test."""

    structure: Stage
    routing: Stage
    quantization: Stage
    sparsity: Stage

    @classmethod
    def of(cls, case: Case, registry: Registry) -> Recipe:
        """Return the recipe of a case."""
        choices = {field.name: getattr(case, field.name) for field in fields(cls)}
        return cls(
            **{
                kind: Stage(registry.get(kind, choice.name), registry.params(kind, choice))
                for kind, choice in choices.items()
            }
        )

    @property
    def changes(self) -> bool:
        """Whether any stage that makes artefacts does something."""
        return any(stage.descriptor.name != "none" for stage in (self.structure, self.quantization, self.sparsity))


def prepare_layer(
    recipe: Recipe,
    weights: LayerWeights,
    shape: ModelShape,
    calibration_TH: Tensor,
    seed: int,
    dtype: torch.dtype,
    identity: Mapping[str, Any],
    cache: Path | None,
) -> PreparedLayer:
    """Return the layer that ``recipe`` makes of one layer's ``weights``.

    ``shape`` is the model's after the recipe's structure (``structure.params.reshape``). ``calibration_TH`` [T, H]
    float32 are inputs of this layer. Weights are rounded to ``dtype`` at the end of the structure, and quantized from
    that; sparsity is calibrated on inputs rounded to ``dtype``, and a router that reads more than these is told
    stand-ins. ``identity`` names what the weights and the calibration are (model, ``layer``, text ...) and goes into
    the keys of the artefacts under ``cache``, beside the sha256 of the tensors themselves.
    """
    cache = cache if recipe.changes else None
    with torch.no_grad():
        parent = "" if cache is None else root_key(weights, shape, calibration_TH, seed, identity)
        weights, parent = _structured(recipe.structure, weights, calibration_TH, seed, parent, cache)
        weights = rounded(weights, dtype)
        layer = int(identity.get("layer", 0))
        bundle = recipe.routing.create()(weights, shape, router_seed(seed, layer))
        store = ExpertStore(
            weights.gate_up if bundle.input_scale == 1.0 else weights.gate_up * bundle.input_scale,
            weights.down,
            bundle.kinds,
            weights.activation,
            weights.gated,
            None if bundle.constants is None else _constants(bundle.constants, dtype),
            heads=weights.heads,
        )
        x_TH = calibration_TH.to(dtype).float()
        fields = StandIns(len(x_TH), store.num_experts, recipe.routing.params, seed)
        seen = Seen(bundle.router, x_TH, alone(fields, bundle.router, layer, store), router_seed(seed, layer))
        origin = {"parent": parent, "dtype": str(dtype), "input_scale": bundle.input_scale}
        store, parent = _quantized(recipe, store, seen, origin, cache)
        seen = replace(seen, ctx=alone(fields, bundle.router, layer, store))
        store = _sparsified(recipe, store, seen, parent, cache)
    scheme = None if bundle.shared is None else bundle.shared.to(dtype)
    return PreparedLayer(store, bundle.router, weights.shared or scheme)


def router_seed(seed: int, layer: int) -> int:
    """Return the seed of one layer's router, so that seeded routers of two layers of a model differ."""
    return int(make_key([seed, "router", layer])[:15], 16)


def root_key(
    weights: LayerWeights, shape: ModelShape, calibration_TH: Tensor, seed: int, identity: Mapping[str, Any]
) -> str:
    """Return the key of what a recipe starts from: every byte of weights and calibration, and what they are called."""
    return make_key(
        {
            "identity": identity,
            "shape": shape,
            "seed": seed,
            "weights": tensors_sha256(weights_artefact(weights).tensors.values()),
            "calibration": tensors_sha256([calibration_TH]),
        }
    )


def rounded(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """Return the weights of the experts, shared ones included, in ``dtype``; the router keeps its own."""
    shared = None if weights.shared is None else weights.shared.to(dtype)
    return replace(weights, gate_up=weights.gate_up.to(dtype), down=weights.down.to(dtype), shared=shared)


def _constants(constants: Constants, dtype: torch.dtype) -> Constants:
    return Constants(constants.gate_C2H.to(dtype), constants.value_CH.to(dtype))


# --- stages: a step that changes nothing has no artefact -------------------------------------------------------------


def _kept(stage: Stage, cache: Path | None) -> Path | None:
    return None if stage.descriptor.name == "none" else cache


def _structured(
    stage: Stage, weights: LayerWeights, calibration_TH: Tensor, seed: int, parent: str, cache: Path | None
) -> tuple[LayerWeights, str]:
    inputs = {"stage": "structure", **stage.identity(), "parent": parent}
    made = cached(
        _kept(stage, cache),
        inputs,
        lambda: stage.create()(weights, calibration_TH, seed),
        weights_artefact,
        weights_of,
    )
    return made, make_key(inputs)


def _quantized(
    recipe: Recipe, store: ExpertStore, seen: Seen, origin: Mapping[str, Any], cache: Path | None
) -> tuple[ExpertStore, str]:
    stage = recipe.quantization
    inputs = {"stage": "quantization", **stage.identity(), **origin}
    calibrated = getattr(stage.params, "calibrated", False)
    if calibrated:
        inputs["routing"] = recipe.routing.identity()
    made = cached(
        _kept(stage, cache),
        inputs,
        lambda: stage.create()(store, seen if calibrated else None),
        quantized_artefact,
        lambda artefact: quantized_of(store, artefact),
    )
    return made, make_key(inputs)


def _sparsified(recipe: Recipe, store: ExpertStore, seen: Seen, parent: str, cache: Path | None) -> ExpertStore:
    if recipe.sparsity.descriptor.name == "none":
        return store
    stage = recipe.sparsity
    inputs = {"stage": "sparsity", **stage.identity(), "routing": recipe.routing.identity(), "parent": parent}

    def build() -> Sparsity | None:
        made: ExpertStore = stage.create()(store, seen.router(seen.x_TH, seen.ctx), seen.x_TH, seed=seen.seed)
        return made.sparsity

    return sparsified(store, cached(cache, inputs, build, sparsity_artefact, sparsity_of))


# --- what a stage made, as an artefact and back ----------------------------------------------------------------------


def weights_artefact(weights: LayerWeights) -> Artefact:
    """Return all tensors of ``weights`` by name, and what else it says."""
    named = {name: getattr(weights, name) for name in ("gate_up", "down", "router_EH", "router_bias_E")}
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
