"""The stages of a recipe, each with its artefact: a step that changes nothing has none.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..contracts import load_attribute, make_key
from .artefacts import Artefact, cached
from .bits.shared import store_of
from .bits.step import shared_step
from .channel_artefacts import sparsified, sparsity_artefact, sparsity_of
from .channels import Sparsity
from .experts import ExpertStore
from .fold_stage import FoldedLayer, FoldStep, check_rescaled, gate_of, with_gate
from .layer import LayerWeights
from .quantization import Seen
from .router import Router, RouterBundle
from .routing import Context
from .shapes import ModelShape
from .stage_artefacts import quantized_artefact, quantized_of, weights_artefact, weights_of

if TYPE_CHECKING:
    from .recipe import Recipe, Stage


def _kept(stage: Stage, cache: Path | None) -> Path | None:
    return cache if stage.makes else None


def apply_structure(
    stage: Stage, weights: LayerWeights, calibration_TH: Tensor, seed: int, parent: str, cache: Path | None
) -> tuple[LayerWeights, str]:
    """Return the layer's weights after the structure, and the key that what follows is known by."""
    inputs = {"stage": "structure", **stage.identity(), "parent": parent}
    made = cached(
        _kept(stage, cache),
        inputs,
        lambda: stage.create()(weights, calibration_TH, seed),
        weights_artefact,
        weights_of,
    )
    return made, make_key(inputs)


def apply_fold(
    recipe: Recipe,
    weights: LayerWeights,
    bundle: RouterBundle,
    x_TH: Tensor,
    ctx: Context,
    shape: ModelShape,
    seed: int,
    parent: str,
    cache: Path | None,
) -> tuple[FoldedLayer, str]:
    """Return the layer as the quantization wants it folded, and the key that what follows is known by."""
    stage, routing = recipe.quantization, recipe.routing
    check_rescaled(weights, bundle, routing.descriptor.name)
    told = {"dtype": str(weights.gate_up.dtype), "routing": routing.identity(), "parent": parent}
    inputs = {"stage": "fold", **stage.identity(), **told}
    step: FoldStep = load_attribute(stage.params.fold)

    def restored(artefact: Artefact) -> FoldedLayer:
        kept, gate = gate_of(artefact)
        return FoldedLayer(weights_of(kept), gate, artefact.meta["short"])

    made = cached(
        cache,
        inputs,
        lambda: step(stage.params, weights, bundle.router(x_TH, ctx), x_TH, routing.params.max_k(shape), seed),
        lambda folded: with_gate(weights_artefact(folded.weights), folded),
        restored,
    )
    return made, make_key(inputs)


def calibrate_router(
    stage: Stage, router: Router, x_TH: Tensor, ctx: Context, origin: Mapping[str, Any], cache: Path | None
) -> None:
    """Tell ``router`` what calibration says, where its parameters ask for it.

    The router reads what the dense model's layer reads, so nothing that is done to the experts changes the outcome: it
    is known before they are quantized, and codecs that look at traffic see that which the layer will have.
    """
    if not stage.calibrated:
        return
    inputs = {"stage": "routing", **stage.identity(), **origin}
    kept = cached(cache, inputs, lambda: Artefact(router.calibration(x_TH, ctx), {}), lambda own: own, lambda own: own)
    router.adopt(kept.tensors)


def apply_quantization(
    recipe: Recipe, store: ExpertStore, seen: Seen, origin: Mapping[str, Any], cache: Path | None
) -> tuple[ExpertStore, str]:
    """Return the layer's experts after the quantization, and the key that what follows is known by."""
    stage = recipe.quantization
    inputs = {"stage": "quantization", **stage.identity(), **origin}
    if stage.calibrated:
        inputs["routing"] = recipe.routing.identity()
    if seen.bits is not None:
        inputs["bits"] = seen.bits.experts
    made = cached(
        _kept(stage, cache),
        inputs,
        lambda: stage.create()(store, seen if stage.calibrated else None),
        quantized_artefact,
        lambda artefact: quantized_of(store, artefact),
    )
    return made, make_key(inputs)


def quantize_shared(recipe: Recipe, seen: Seen, origin: Mapping[str, Any], cache: Path | None) -> ExpertStore | None:
    """Return the shared expert's bytes where a plan gives it bits, otherwise None."""
    bits = None if seen.bits is None else seen.bits.shared
    if bits is None or seen.shared is None:
        return None
    stage, dense = recipe.quantization, store_of(seen.shared)
    return cached(
        cache,
        {"stage": "shared", **stage.identity(), **origin, "routing": recipe.routing.identity(), "bits": bits},
        lambda: shared_step(stage.params, seen, bits),
        quantized_artefact,
        lambda artefact: quantized_of(dense, artefact),
    )


def apply_sparsity(recipe: Recipe, store: ExpertStore, seen: Seen, parent: str, cache: Path | None) -> ExpertStore:
    """Return the layer's experts with what the sparsity found for them."""
    if recipe.sparsity.descriptor.name == "none":
        return store
    stage = recipe.sparsity
    inputs = {"stage": "sparsity", **stage.identity(), "routing": recipe.routing.identity(), "parent": parent}

    def build() -> Sparsity | None:
        made: ExpertStore = stage.create()(store, seen.router(seen.x_TH, seen.ctx), seen.x_TH, seed=seen.seed)
        return made.sparsity

    return sparsified(store, cached(cache, inputs, build, sparsity_artefact, sparsity_of))
