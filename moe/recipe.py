"""Recipes: structure, fold, quantization, routing and sparsity, each calibrated on the result so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contracts import Case, Descriptor, Registry, load_attribute, make_key
from .artefacts import sources_sha256, tensors_sha256
from .bits.params import LayerBits
from .bits.shared import shared_of
from .experts import Constants, ExpertStore
from .fold_stage import FoldedLayer, Unscaled, check_rescaled, check_rounded
from .layer import LayerWeights, PreparedLayer, RoundedGate, scaled_input
from .quantization import Seen
from .router import RouterBundle
from .shapes import ModelShape
from .stage_artefacts import weights_artefact
from .stages import (
    apply_fold,
    apply_quantization,
    apply_sparsity,
    apply_structure,
    calibrate_router,
    quantize_shared,
)
from .stand_ins import StandIns, alone
from .stored import stored_after


class Stage(NamedTuple):
    """One step of a recipe: a plug-in and its checked parameters."""

    descriptor: Descriptor
    params: Any

    def create(self) -> Any:
        """Return what the plug-in's factory makes of the parameters."""
        return load_attribute(self.descriptor.factory)(self.params)

    @property
    def calibrated(self) -> bool:
        """Whether the plug-in looks at what the layer reads in calibration."""
        return bool(getattr(self.params, "calibrated", False))

    @property
    def makes(self) -> bool:
        """Whether this step makes something that is worth keeping: neither does one that changes nothing, nor one that
        takes what lies in the model's file."""
        return self.descriptor.name != "none" and not getattr(self.params, "as_stored", False)

    def identity(self) -> dict[str, Any]:
        """Return what tells this step from another: name, version, parameters, and the sources behind it."""
        behind = [self.descriptor.factory, *filter(None, [getattr(self.params, "fold", None)])]
        return {
            "name": self.descriptor.name,
            "version": self.descriptor.version,
            "params": self.params,
            "sources": [sources_sha256(place) for place in behind],
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
        made = (self.structure, self.quantization, self.sparsity)
        return self.routing.calibrated or any(stage.makes for stage in made)


@dataclass(frozen=True, eq=False)
class Begun:
    """A layer after its structure and its router, in the dtype of the case: what quantization starts from.

    ``layer`` has its dense experts, and a router that reads the layer's input; ``seen`` is what its experts read.
    ``origin`` is what of all this goes into the keys of artefacts, whose folder is ``cache`` (None: nothing is kept).
    """

    layer: PreparedLayer
    seen: Seen
    fields: StandIns
    origin: Mapping[str, Any]
    cache: Path | None


def prepare_layer(
    recipe: Recipe,
    weights: LayerWeights,
    shape: ModelShape,
    calibration_TH: Tensor,
    seed: int,
    dtype: torch.dtype,
    identity: Mapping[str, Any],
    cache: Path | None,
    bits: LayerBits | None = None,
) -> PreparedLayer:
    """Return the layer that ``recipe`` makes of one layer's ``weights``: ``begin_layer``, then ``finish_layer``."""
    begun = begin_layer(recipe, weights, shape, calibration_TH, seed, dtype, identity, cache)
    return finish_layer(recipe, begun, bits)


def finish_layer(recipe: Recipe, begun: Begun, bits: LayerBits | None = None) -> PreparedLayer:
    """Return what quantization and sparsity of ``recipe`` make of a layer that has begun.

    ``bits`` is what a plan over several layers gives this one, where its quantization spends a budget over them.
    """
    seen, cache = replace(begun.seen, bits=bits), begun.cache
    with torch.no_grad():
        store, parent = apply_quantization(recipe, begun.layer.store, seen, begun.origin, cache)
        store = replace(store, stored=None)
        shared_store = quantize_shared(recipe, seen, begun.origin, cache)
        seen = replace(seen, ctx=alone(begun.fields, seen.router, seen.layer, store))
        store = apply_sparsity(recipe, store, seen, parent, cache)
    shared = seen.shared
    if shared is not None and shared_store is not None:
        shared = shared_of(shared, shared_store)
    return replace(begun.layer, store=store, shared=shared, shared_store=shared_store, bits=bits)


def begin_layer(
    recipe: Recipe,
    weights: LayerWeights,
    shape: ModelShape,
    calibration_TH: Tensor,
    seed: int,
    dtype: torch.dtype,
    identity: Mapping[str, Any],
    cache: Path | None,
) -> Begun:
    """Return one layer's ``weights`` after the structure and with the router of ``recipe``.

    ``shape`` is the model's after the recipe's structure (``structure.params.reshape``). ``calibration_TH`` [T, H]
    float32 are inputs of this layer. Weights are rounded to ``dtype`` at the end of the structure, and quantized from
    that, after the fold stage where the quantization has one; sparsity is calibrated on inputs rounded to ``dtype``,
    and a router that reads more than these is told stand-ins. ``identity`` names what the weights and the calibration
    are (model, ``layer``, text ...) and goes into the keys of the artefacts under ``cache``, beside the sha256 of the
    tensors themselves.
    """
    cache = cache if recipe.changes else None
    with torch.no_grad():
        stored = stored_after(recipe.structure.params, weights.stored)
        parent = "" if cache is None else root_key(weights, shape, calibration_TH, seed, identity)
        weights, parent = apply_structure(recipe.structure, weights, calibration_TH, seed, parent, cache)
        weights = rounded(weights, dtype)
        layer = int(identity.get("layer", 0))
        make_router, own_seed = recipe.routing.create(), router_seed(seed, layer)
        bundle = make_router(weights, shape, own_seed)
        x_TH = calibration_TH.to(dtype).float()
        fields = StandIns(len(x_TH), len(bundle.kinds), recipe.routing.params, seed)
        told = {"dtype": str(dtype), "parent": parent}
        ctx = alone(fields, bundle.router, layer, _store(weights, bundle, dtype))
        calibrate_router(recipe.routing, bundle.router, x_TH, ctx, told, cache)
        made, gate = FoldedLayer(weights), None
        if hasattr(recipe.quantization.params, "fold"):
            made, parent = apply_fold(recipe, weights, bundle, x_TH, ctx, shape, own_seed, parent, cache)
            weights = made.weights
        if made.gate is not None and weights.router_EH is not None:
            gate = RoundedGate(made.gate, bundle.router)
            bundle = make_router(weights, shape, own_seed)
            check_rounded(bundle, weights.router_EH, recipe.routing.descriptor.name)
            calibrate_router(recipe.routing, bundle.router, x_TH, ctx, {**told, "parent": parent}, cache)
        store, router = _store(weights, bundle, dtype), bundle.router
        store = replace(store, stored=stored if bundle.input_scale == 1.0 else None)
        if weights.input_scale_H is not None:
            check_rescaled(weights, bundle, recipe.routing.descriptor.name)
            x_TH = scaled_input(calibration_TH.to(dtype), weights.input_scale_H).float()
            router = Unscaled(router, weights.input_scale_H)
        shared = weights.shared or (None if bundle.shared is None else bundle.shared.to(dtype))
        seen = Seen(router, x_TH, alone(fields, router, layer, store), own_seed, layer, shared)
    origin = {"parent": parent, "dtype": str(dtype), "input_scale": bundle.input_scale}
    layer_so_far = PreparedLayer(store, bundle.router, shared, weights.input_scale_H, gate, made.short)
    return Begun(layer_so_far, seen, fields, origin, cache)


def _store(weights: LayerWeights, bundle: RouterBundle, dtype: torch.dtype) -> ExpertStore:
    """Return the layer's dense experts as the router knows them."""
    return ExpertStore(
        weights.gate_up if bundle.input_scale == 1.0 else weights.gate_up * bundle.input_scale,
        weights.down,
        bundle.kinds,
        weights.activation,
        weights.gated,
        None if bundle.constants is None else _constants(bundle.constants, dtype),
        heads=weights.heads,
    )


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
