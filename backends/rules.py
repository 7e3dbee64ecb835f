"""What a backend takes: refusals in one sentence, and the Execution of what it accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from ..contracts import OWNERS, Availability, Evidence, Execution, LayerSpec, Refusal
from ..kernels import devices

ACTIVATIONS = ("silu", "gelu", "relu")
"""The activations of ``moe.experts.ACTIVATIONS``, named here so that the parent need not import torch."""

FEATURES = {
    "topk": "a number of channels per token",
    "fixed": "fixed channels",
    "gate": "channels by the gate",
    "per_expert": "channels by a rule of each expert's own",
    "basis": "channels of a rotated input",
    "residual": "channels that a low-rank matrix reads",
}
"""What sparsity may ask of a backend beyond shared thresholds at input and hidden (``SparsitySpec.features``)."""

MASKED = tuple(name for name in FEATURES if name not in ("basis", "residual"))
"""The features that masks before and between the products do, without a further product."""

BOUNDARIES = ("topk", "sorted", "logits")


def wherever_torch_runs() -> Availability:
    """Return the availability of a backend made of torch's own operators: the CPU, and a GPU where there is one."""
    if devices.missing("CUDA", "ROCm"):
        return Availability(True)
    return Availability(True, devices=("cpu", "cuda"), evidence=(Evidence.MEASURED_CPU, Evidence.MEASURED_GPU))


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


def sparsity_refusal(spec: LayerSpec, backend: str, leaves_out: Iterable[str]) -> str:
    """Return why ``backend`` cannot leave out what the layer's sparsity says, or an empty string."""
    if spec.sparsity is None:
        return ""
    if "sequence" in spec.kinds:
        return f"{backend} leaves nothing out of attentions; use sparsity=none"
    if "gate" in spec.sparsity.sites and not spec.gated:
        return "experts without a gate have no site 'gate'; leave channels out at input or hidden"
    if "gather" in spec.kinds and spec.sparsity.features:
        return f"{backend} leaves channels of 'gather' experts out by one shared threshold; use sparsity=teal"
    if spec.sparsity.masked_weights and is_quantized(spec):
        return "weights are set to zero before they are stored as they are; use quantization=none"
    foreign = next((name for name in spec.sparsity.features if name not in leaves_out), None)
    return "" if foreign is None else f"{backend} does not leave out {FEATURES[foreign]}; use the eager backend"


def refusal(
    spec: LayerSpec,
    backend: str,
    dtypes: tuple[str, ...],
    kinds: tuple[str, ...] = ("ffn",),
    backward: bool = False,
    rounds_tokens: bool = False,
    leaves_out: Iterable[str] = (),
) -> Refusal | None:
    """Return why ``backend`` cannot take ``spec``, or None; the checks that all our backends share.

    ``rounds_tokens`` says that the backend does what schemes with ``act_bits`` ask for; ``leaves_out`` names the
    ``FEATURES`` of sparsity that it knows.
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
    elif spec.backward and not backward:
        reason = f"{backend} has no backward; use eager or grouped for pass=forward_backward"
    elif spec.backward and is_quantized(spec):
        reason = "quantized weights have no gradient; use quantization=none for pass=forward_backward"
    else:
        reason = token_refusal(spec, backend, rounds_tokens) or sparsity_refusal(spec, backend, leaves_out)
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
