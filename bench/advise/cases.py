"""Cases of suite ``offload`` as the advice sees them: their bytes, and the time that it predicts. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...backends.offload.access import slots_of
from ...contracts import Case, MoebenchError, Registry
from ...moe.blocks.gguf_file import read_header
from ...moe.shapes import ModelShape
from .caching import lru_hit_rate, touch_probabilities
from .counts import PARTS, Layer, Model
from .forms import FORMS, Weights
from .gguf_source import gguf_model
from .hardware import Hardware
from .predict import Load, Prediction, Split, predict
from .readers import read_model
from .source import read_json

OFFLOAD = "offload"


def case_model(case: Case, registry: Registry) -> Model:
    """Return the counts of what a case runs: a language model on text, else its MoE layers alone."""
    params = registry.params("model", case.model)
    shape = registry.params("structure", case.structure).reshape(params.shape())
    if case.traffic.name != "recorded":
        return Model("layers", shape.hidden, 0, tuple(_with_experts(Layer(), shape) for _ in case.layers), 0, 0, 0)
    whole = _whole(params)
    layers = list(whole.layers)
    for index in case.layers:
        layers[index] = _with_experts(layers[index], shape)
    return replace(whole, layers=tuple(layers))


def _whole(params: Any) -> Model:
    if hasattr(params, "config"):
        return read_model(params.config())
    place = params.fetch(lambda line: None)
    if place.suffix == ".gguf":
        return gguf_model(read_header(place))
    return read_model(read_json(place / "config.json"))


def _with_experts(layer: Layer, shape: ModelShape) -> Layer:
    shared = shape.matrices * shape.hidden * shape.shared_width
    return replace(
        layer,
        dense=0,
        shared=max(shared, layer.shared),
        expert=shape.matrices * shape.hidden * shape.width,
        experts=shape.experts,
        k=shape.top_k,
        rest=layer.rest if layer.experts else layer.rest + shape.hidden * shape.experts,
    )


def case_weights(case: Case, model: Model) -> Weights:
    """Return the bytes of a case's weights: routed experts as it quantizes them, all else in its dtype."""
    dense = FORMS[case.dtype].bits
    name = case.quantization.name
    if name not in ("none", "int8", "int4"):
        raise MoebenchError(f"no time is predicted for quantization '{name}'; use none, int8 or int4.")
    bits = dict.fromkeys(PARTS, dense) | {"experts": dense if name == "none" else FORMS[name].bits}
    return Weights(case.dtype, {part: round(count * bits[part] / 8) for part, count in model.parameters().items()})


def case_load(case: Case) -> Load:
    """Return the load of a case, at the context that it has half way."""
    return Load(case.tokens, int(case.workload["prompt"]) + int(case.workload["steps"]) // 2)


def case_split(case: Case, model: Model) -> Split:
    """Return where a case has its experts; hits are those of LRU under tokens that choose independently."""
    if case.backend.name != OFFLOAD:
        return Split("ram", "ram", ours=True)
    first, load = model.moe_layers[0], case_load(case)
    touched = touch_probabilities(first.experts, first.k, load.skew, load.batch)
    experts = sum(layer.experts for layer in model.layers)
    slots = max(1, slots_of(float(case.backend.params["capacity"]), experts))
    return Split("ram", "ram", lru_hit_rate(touched, len(model.moe_layers), slots), "disk", ours=True)


def case_prediction(case: Case, registry: Registry, hardware: Hardware) -> Prediction:
    """Return what the advice predicts of a case."""
    model = case_model(case, registry)
    return predict(model, case_weights(case, model), hardware, case_load(case), case_split(case, model))
