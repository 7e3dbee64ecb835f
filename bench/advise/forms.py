"""How weights are stored, and what that takes: bytes of every part, scales included. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...contracts import MoebenchError, unknown
from .counts import PARTS, Model

FFNS = frozenset({"experts", "shared", "dense"})


@dataclass(frozen=True)
class Form:
    """``bits`` of a weight, scales included, in the parts that it ``covers``; all others are bfloat16."""

    name: str
    bits: float
    covers: frozenset[str]
    about: str


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("float32", 32, frozenset(PARTS), "everything"),
        Form("bfloat16", 16, frozenset(PARTS), "everything"),
        Form("float16", 16, frozenset(PARTS), "everything"),
        Form("fp8", 8 + 32 / 128**2, FFNS | {"attention"}, "FFNs and attention, a float32 scale for 128 x 128"),
        Form("int8", 8 + 16 / 128, FFNS | {"attention"}, "FFNs and attention, a 16-bit scale for 128"),
        Form("int4", 4 + 32 / 128, FFNS | {"attention"}, "FFNs and attention, 16-bit scale and zero for 128"),
        Form("mxfp4", 4 + 8 / 32, frozenset({"experts"}), "routed experts, an 8-bit scale for 32"),
    )
}
"""Every form that can be planned, by its name."""

QUANT_METHODS = {"fp8": "fp8", "mxfp4": "mxfp4"}
BY_BITS = {"8": "int8", "4": "int4"}


@dataclass(frozen=True)
class Weights:
    """Bytes of each of ``PARTS`` of a model in one form."""

    form: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """Bytes of all but the routed experts."""
        return self.total - self.parts["experts"]

    def expert(self, model: Model) -> float:
        """Mean bytes of a routed expert."""
        return self.parts["experts"] / sum(layer.experts for layer in model.layers)


def form(name: str) -> Form:
    """Return the form of this name, or raise MoebenchError with a sentence."""
    if name not in FORMS:
        raise MoebenchError(unknown("form of weights", name, FORMS))
    return FORMS[name]


def weights_in(model: Model, own: Form) -> Weights:
    """Return what a model takes in a form."""
    bits = {part: own.bits if part in own.covers else FORMS["bfloat16"].bits for part in PARTS}
    return Weights(own.name, {part: round(count * bits[part] / 8) for part, count in model.parameters().items()})


def stored_form(config: Mapping[str, Any]) -> Form:
    """Return the form in which a configuration says that its weights are stored, bfloat16 where it does not say.

    Raises MoebenchError where it names a quantization of which nothing is known here.
    """
    given = config.get("quantization_config") or {}
    if not isinstance(given, Mapping):
        raise MoebenchError("quantization_config of the configuration says nothing sensible; choose with --form.")
    if not given:
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return form(name)
    method = str(given.get("quant_method"))
    name = QUANT_METHODS.get(method, "")
    if method in ("gptq", "awq"):
        name = BY_BITS.get(str(given.get("bits")), "")
    if not name:
        raise MoebenchError(
            f"the weights are quantized by '{method}', of whose bytes nothing is known here; choose with --form."
        )
    return FORMS[name]
