"""All that ``moebench advise`` has to say of a model on a machine, as plain facts. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...contracts import MoebenchError
from .asked import Asked
from .counts import PARTS, Model, scratch_bytes
from .forms import FORMS, Weights, weights_in
from .forms import form as form_named
from .hardware import Hardware
from .placements import NoRoom, Placement, placements
from .predict import Load
from .source import Described
from .validate import Compared

Goal = Literal["tpot", "throughput"]
SMALLER = ("int8", "int4")
"""Forms that are planned beside the stored one, where they take fewer bytes."""


@dataclass(frozen=True)
class Advice:
    """What fits, best first, and what does not."""

    described: Described
    hardware: Hardware
    load: Load
    goal: Goal
    forms: Sequence[Weights]
    ranked: Sequence[Placement]
    refused: Sequence[NoRoom]


def advise(described: Described, hardware: Hardware, load: Load, goal: Goal, names: Sequence[str] = ()) -> Advice:
    """Return the advice; ``names`` are the forms to plan instead of the stored one and those of SMALLER."""
    forms = forms_of(described, names)
    ranked: list[Placement] = []
    refused: list[NoRoom] = []
    for weights in forms:
        for found in placements(Asked(described.model, weights, hardware, load), goal == "throughput"):
            (ranked if isinstance(found, Placement) else refused).append(found)  # type: ignore[arg-type]
    if goal == "throughput":
        ranked.sort(key=lambda one: -one.prediction.tokens_per_s)
    else:
        ranked.sort(key=lambda one: one.prediction.serial)
    return Advice(described, hardware, load, goal, forms, ranked, refused)


def forms_of(described: Described, names: Sequence[str]) -> list[Weights]:
    """Return the model's bytes in every form to plan."""
    model, stored = described.model, described.stored
    if names:
        return [weights_in(model, form_named(name)) for name in dict.fromkeys(names)]
    if stored is None:
        raise MoebenchError(described.why)
    smaller = [weights_in(model, FORMS[name]) for name in SMALLER]
    return [stored, *(one for one in smaller if one.total < 0.98 * stored.total)]


def facts(advice: Advice) -> dict[str, Any]:
    """Return everything as JSON takes it; sizes in bytes, times in seconds, rates in bytes or flop a second."""
    model, load = advice.described.model, advice.load
    counts = model.parameters()
    return {
        "model": {
            "name": advice.described.name,
            "model_type": model.kind,
            "origin": advice.described.origin,
            "notes": list(advice.described.notes),
            "layers": len(model.layers),
            "moe_layers": len(model.moe_layers),
            "experts": model.moe_layers[0].experts,
            "experts_per_token": model.moe_layers[0].k,
            "weights": model.total,
            "weights_of_a_token": model.active,
        },
        "parts": {
            part: {"weights": counts[part], "bytes": {form.form: form.parts[part] for form in advice.forms}}
            for part in PARTS
        },
        "bytes": {form.form: form.total for form in advice.forms},
        "kv_bytes": load.batch * model.kv_bytes(load.context),
        "scratch_bytes": scratch_bytes(model, load.batch),
        "load": {"batch": load.batch, "context": load.context, "skew": load.skew, "goal": advice.goal},
        "memory": {"vram": advice.hardware.vram, "ram": advice.hardware.ram},
        "rates": {name: {"value": rate.value, "source": rate.source} for name, rate in advice.hardware.rates.items()},
        "does_not_fit": [{"placement": one.name, "form": one.form, "sum": one.sum} for one in advice.refused],
        "ranked": [_placement(model, one) for one in advice.ranked],
    }


def _placement(model: Model, one: Placement) -> dict[str, Any]:
    made = one.prediction
    return {
        "evidence": "model",
        "placement": one.name,
        "as_in": one.as_in,
        "form": one.form,
        "batch": one.load.batch,
        "bytes": {"vram": round(one.vram), "ram": round(one.ram), "disk": round(one.disk)},
        "share_of_experts": one.share,
        "hit_rate": one.hit,
        "hit_rate_rule": one.rule or None,
        "tpot_s": made.serial,
        "tpot_overlapped_s": made.overlapped,
        "tokens_per_s": made.tokens_per_s,
        "terms": [{"what": term.what, "tier": term.tier, "seconds": term.seconds} for term in made.terms],
    }


def compared_facts(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return measured cases beside their predictions as JSON takes them."""
    return [
        {
            "model": one.name,
            "backend": one.measured.case.backend.name,
            "run_id": one.measured.run_id,
            "case_key": one.measured.case.case_key,
            "measured_s": one.measured.seconds,
            "measured_p10_s": one.measured.undisturbed,
            "predicted_s": one.predicted,
            "error": one.error,
            "flags": list(one.measured.flags),
        }
        for one in compared
    ]
