"""What a backend takes: refusals in one sentence, and the Execution of what it accepts. Imports no torch."""

from __future__ import annotations

from ..contracts import OWNERS, Execution, LayerSpec, Refusal

ACTIVATIONS = ("silu", "gelu", "relu")
"""The activations of ``moe.experts.ACTIVATIONS``, named here so that the parent need not import torch."""

BOUNDARIES = ("topk", "sorted", "logits")


def is_quantized(spec: LayerSpec) -> bool:
    """Return whether any expert is stored in codes."""
    return any(scheme.codec != "none" for scheme in spec.schemes)


def act_bits(spec: LayerSpec) -> int | None:
    """Return to how many bits the experts round their tokens, or None; of several (``refusal``), the first."""
    return next((scheme.act_bits for scheme in spec.schemes if scheme.act_bits is not None), None)


def token_refusal(spec: LayerSpec, backend: str, rounds_tokens: bool) -> str:
    """Return why ``backend`` cannot round the tokens of a layer as its schemes say, or an empty string."""
    bits = act_bits(spec)
    if bits is None:
        return ""
    if len({scheme.act_bits for scheme in spec.schemes}) > 1:
        return "experts of one layer round their tokens to different bits; give all the same act_bits"
    if not rounds_tokens:
        return f"{backend} reads tokens as they are, not rounded to {bits} bits; use eager or grouped"
    if "sequence" in spec.kinds:
        return f"{backend} rounds no tokens of attentions; use a quantization without act_bits"
    return "" if 2 <= bits <= 8 else f"tokens are rounded to 2 to 8 bits, not {bits}; choose another act_bits"


def refusal(
    spec: LayerSpec,
    backend: str,
    dtypes: tuple[str, ...],
    kinds: tuple[str, ...] = ("ffn",),
    backward: bool = False,
    rounds_tokens: bool = False,
) -> Refusal | None:
    """Return why ``backend`` cannot take ``spec``, or None; the checks that all our backends share.

    ``rounds_tokens`` says that the backend does what schemes with ``act_bits`` ask for.
    """
    foreign = [kind for kind in dict.fromkeys(spec.kinds) if kind not in kinds]
    reason = ""
    if foreign:
        remedy = "use" if foreign[0] in OWNERS else "fold them, or use"
        reason = f"{backend} runs no '{foreign[0]}' experts; {remedy} the reference backend"
    elif "sequence" in spec.kinds and (spec.heads < 1 or spec.width % spec.heads):
        reason = f"attentions of {spec.heads} heads do not divide their {spec.width} channels; give LayerSpec.heads"
    elif spec.dtype not in dtypes:
        reason = f"{backend} computes in {', '.join(dtypes)}, not {spec.dtype}"
    elif spec.activation not in ACTIVATIONS:
        reason = f"{backend} knows the activations {', '.join(ACTIVATIONS)}, not {spec.activation}"
    elif spec.boundary not in BOUNDARIES:
        reason = f"{backend} takes the boundaries {', '.join(BOUNDARIES)}, not {spec.boundary}"
    elif spec.boundary == "logits" and spec.selection is None:
        reason = f"{backend} cannot select from logits here, because this router gives no selection; use boundary=topk"
    elif spec.sparsity is not None and spec.sparsity.rule != "threshold":
        reason = f"{backend} leaves out activations by a threshold, not by '{spec.sparsity.rule}'"
    elif spec.sparsity is not None and "sequence" in spec.kinds:
        reason = f"{backend} leaves nothing out of attentions; use sparsity=none"
    elif spec.backward and not backward:
        reason = f"{backend} has no backward; use eager or grouped for pass=forward_backward"
    elif spec.backward and is_quantized(spec):
        reason = "quantized weights have no gradient; use quantization=none for pass=forward_backward"
    else:
        reason = token_refusal(spec, backend, rounds_tokens)
    return Refusal(reason) if reason else None


def execution(
    spec: LayerSpec, natives: tuple[str, ...], packed: bool = False, excludes: tuple[str, ...] = ()
) -> Execution:
    """Return how a backend runs a layer that it takes: with the case's boundary where that is one of ``natives``."""
    return Execution(
        weights="packed" if packed else "dequantized" if is_quantized(spec) else "dense",
        sparse="none" if spec.sparsity is None else "mask",
        boundary=spec.boundary if spec.boundary in natives else natives[0],
        excludes=excludes,
    )
