"""What a case is about, made in a worker: the layer after its recipe, and its inputs. Imported by workers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..contracts import Case, LayerSpec, Metric, Registry, make_key
from ..moe.bits.plan import Plan
from ..moe.layer import PreparedLayer
from ..moe.recipe import Begun, Recipe, begin_layer, finish_layer
from ..moe.routing import Routing
from ..moe.shapes import ModelShape
from ..moe.stand_ins import StandIns, alone
from .allocation import plan_for
from .base import layer_spec
from .models import ModelSource, cache_dir, substream

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""torch's dtypes by the names that cases use."""


@dataclass(frozen=True)
class Subject:
    """One layer of a case with everything needed to call it; ``plan`` where its bits are those of several layers."""

    source: ModelSource
    shape: ModelShape
    layer: PreparedLayer
    spec: LayerSpec
    plan: Plan | None = None


@dataclass(frozen=True)
class Batch:
    """The input of one step: what the experts read, in the case's dtype, the Routing, and the boundary's tensors."""

    x_TH: Tensor
    routing: Routing
    inputs: tuple[Tensor, ...]


_SUBJECTS: OrderedDict[str, Subject] = OrderedDict()
MAX_SUBJECTS = 64


def prepare_subject(case: Case, registry: Registry) -> Subject:
    """Return the case's layer after its recipe; cases of one method, dtype and boundary share it within a worker."""
    key = make_key([case.method_key, case.layers, case.dtype, case.boundary, case.pass_])
    if key not in _SUBJECTS:
        _SUBJECTS[key] = _build(case, registry)
        if len(_SUBJECTS) > MAX_SUBJECTS:
            _SUBJECTS.popitem(last=False)
    _SUBJECTS.move_to_end(key)
    return _SUBJECTS[key]


def _build(case: Case, registry: Registry) -> Subject:
    return build_subject(case, registry, Recipe.of(case, registry), cache_dir())


def build_subject(case: Case, registry: Registry, recipe: Recipe, cache: Path | None) -> Subject:
    """Return the case's one layer after ``recipe``; its stages find what they made before under ``cache``, if any."""
    source: ModelSource = registry.get("model", case.model.name).create(case.model.params)
    shape: ModelShape = registry.params("structure", case.structure).reshape(source.shape)
    index = case.layers[0]

    def begin(layer: int) -> Begun:
        states_TH = calibration_states(case, registry, source, layer, recipe.changes)
        identity = {"weights": case.weights_sha256, "layer": layer}
        dtype = DTYPES[case.dtype]
        return begin_layer(recipe, source.layer(layer), shape, states_TH, case.seed, dtype, identity, cache)

    plan = plan_for(case, source, recipe, begin)
    layer = finish_layer(recipe, begin(index), None if plan is None else plan.layers[index])
    return Subject(source, shape, layer, layer_spec(case, shape, registry), plan)


def calibration_states(case: Case, registry: Registry, source: ModelSource, index: int, wanted: bool = True) -> Tensor:
    """Return x_TH float32 for calibration: recorded ones where the model has them, gaussian ones otherwise.

    Where they are not ``wanted``, since no stage of the recipe looks at them, nothing is recorded for them.
    """
    tokens = int(case.calibration.get("tokens", 1024))
    if wanted and registry.params("model", case.model).recorded:
        return source.hidden_states(index, "calibration", tokens, substream(case.seed, "calibration"))
    rng = torch.Generator().manual_seed(substream(case.seed, "calibration", index))
    return torch.randn(tokens, source.shape.hidden, generator=rng)


def make_batch(case: Case, registry: Registry, subject: Subject, step: int) -> Batch:
    """Return the input of ``step``: traffic's hidden states, routed by the router or by the traffic itself."""
    traffic = registry.get("traffic", case.traffic.name).create(case.traffic.params)
    index = case.layers[0]
    x_TH = traffic.hidden(subject.source, index, case.tokens, step, case.seed).to(DTYPES[case.dtype])
    if traffic.forced:
        routing = traffic.routing(case.tokens, subject.spec.experts, subject.spec.max_k, step, case.seed, layer=index)
    else:
        with torch.no_grad():
            layer, params = subject.layer, registry.params("routing", case.routing)
            fields = StandIns(case.tokens, subject.spec.experts, params, substream(case.seed, "routing", step))
            routing = layer.router(x_TH, alone(fields, layer.router, index, layer.store))
    inputs = boundary_inputs(case.boundary, routing, subject.spec, selection_bias(subject))
    return Batch(subject.layer.reads(x_TH), routing, inputs)


def selection_bias(subject: Subject) -> Tensor | None:
    """Return the bias_E that the router adds for selection only, where its selection has one."""
    selection = subject.spec.selection
    if selection is None or not selection.bias:
        return None
    bias_E: Tensor = subject.layer.router.get_buffer("selector.bias_E")
    return bias_E


def gate_metrics(layers: Sequence[PreparedLayer]) -> list[Metric]:
    """Return ``router_bytes`` of all layers, and how many experts balanced calibration left short where it was asked.

    A gate that was rounded counts as it is packed.
    """
    short = [layer.short_experts for layer in layers if layer.short_experts is not None]
    found = [Metric("router_bytes", float(sum(layer.router_nbytes for layer in layers)), "byte")]
    return found + ([Metric("calibration_short_experts", float(sum(short)), "experts")] if short else [])


def boundary_inputs(
    boundary: str, routing: Routing, spec: LayerSpec, bias_E: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return what an executor takes besides x at this boundary; logits come with the selection's bias, if any."""
    if boundary == "topk":
        return routing.padded(spec.max_k)
    if boundary == "sorted":
        return routing.sorted()
    if routing.logits_TE is None:
        raise ValueError("this router keeps no logits; use axes.boundary=topk")
    logits_TE = routing.logits_TE.float()
    return (logits_TE,) if bias_E is None else (logits_TE, bias_E)
