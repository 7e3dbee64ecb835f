"""A model as the header of a GGUF file tells it: exact bytes of every tensor, and no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...contracts import MoebenchError
from ...moe.blocks.gguf_file import GgufFile, Place, read_header
from ...moe.blocks.gguf_types import types
from .counts import MOST_LAYERS, PARTS, Layer, Model, check_sense
from .forms import Weights
from .source import Described

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
PATTERNS: tuple[tuple[str, str], ...] = (
    ("experts", r"^ffn_(gate|up|down|gate_up)_exps"),
    ("shared", r"_shexp"),
    ("rest", r"^(attn|ffn|post_attention|post_ffw|layer_out|ffn_pre|attn_out)_norm|_inp\b|^exp_probs"),
    ("attention", r"^(attn|ssm|shortconv)_"),
    ("dense", r"^ffn_(gate|up|down)"),
)
"""Which part a layer's tensor belongs to: the first that fits; ``rest`` where none does."""


def describe_gguf(path: Path) -> Described:
    """Return what the header says; MoebenchError where it cannot be read, is one of several, or has no experts."""
    file = read_header(path)
    count = file.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise MoebenchError(f"{path} is one of {count} parts; join them with llama-gguf-split --merge first.")
    model = gguf_model(file)
    if not model.moe_layers:
        raise MoebenchError(f"{path} has no experts; name a model with some.")
    notes = _notes(file, model.kind, _further(file))
    weights = _weights(file, len(model.layers))
    return Described(path.stem, model, weights, "the GGUF file's header", notes)


def gguf_model(file: GgufFile) -> Model:
    """Return the counts of a model, with experts or without."""
    kind, depth = str(file.metadata.get("general.architecture")), _number(file, "block_count") - _further(file)
    if not 0 < depth <= MOST_LAYERS:
        raise MoebenchError(f"{file.path} says that it has {depth} layers; convert the model again.")
    layers = tuple(_layer(file, index) for index in range(depth))
    embedding = file.place("token_embd.weight")
    head = file.tensors["output.weight"].size if "output.weight" in file.tensors else 0
    around = [place for place in file.tensors.values() if not BLOCK.fullmatch(place.name)]
    rest = sum(place.size for place in around) - embedding.size - head
    model = Model(kind, embedding.dims[0], embedding.dims[-1], layers, embedding.size, head, rest, None)
    try:
        return check_sense(model)
    except ValueError as error:
        raise MoebenchError(f"{file.path} makes no sense ({error}); convert the model again.") from None


def _further(file: GgufFile) -> int:
    """Return how many layers only predict further tokens."""
    name = "nextn_predict_layers"
    return _number(file, name) if file.metadata.get(f"{file.metadata.get('general.architecture')}.{name}") else 0


def part_of(name: str) -> str:
    """Return the part of a model that a tensor belongs to."""
    found = BLOCK.fullmatch(name)
    if not found:
        return "embedding" if name.startswith(("token_embd.", "output.")) else "rest"
    return next((part for part, pattern in PATTERNS if re.search(pattern, found[2])), "rest")


def _weights(file: GgufFile, depth: int) -> Weights:
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    names: dict[str, int] = {}
    for place in file.tensors.values():
        found = BLOCK.fullmatch(place.name)
        if found and int(found[1]) >= depth:
            continue
        if place.type not in types():
            raise MoebenchError(
                f"{place.name!r} in {file.path} has type {place.type}, which the installed gguf does not know; "
                f"run pip install -U gguf."
            )
        name, block, size = types()[place.type]
        part = part_of(place.name)
        parts[part] += place.size // block * size
        if part == "experts":
            names[name] = names.get(name, 0) + place.size
    return Weights(" ".join(sorted(names, key=lambda name: -names[name])), parts)


def _layer(file: GgufFile, index: int) -> Layer:
    own = [place for place in file.tensors.values() if place.name.startswith(f"blk.{index}.")]
    sizes = {part: [place for place in own if part_of(place.name) == part] for part in PARTS}
    experts = next((place.dims[-1] for place in sizes["experts"]), 0)
    k = _number(file, "expert_used_count") if experts else 0
    return Layer(
        attention=_total(sizes["attention"]),
        dense=_total(sizes["dense"]),
        shared=_total(sizes["shared"]),
        expert=_total(sizes["experts"]) // experts if experts else 0,
        experts=experts,
        k=k,
        rest=_total(sizes["rest"]),
        width=k * _width(sizes["experts"]) + _width(sizes["shared"]) + _width(sizes["dense"]),
        kv_values=_kv_values(file, own),
        window=_window(file, index),
    )


def _total(places: Iterable[Place]) -> int:
    return sum(place.size for place in places)


def _width(places: Iterable[Place]) -> int:
    return next((place.dims[0] for place in places if ".ffn_down" in place.name), 0)


def _kv_values(file: GgufFile, own: list[Place]) -> int:
    """Values kept of a token: those of the projections of keys and values, or the latent with its rotary key."""
    dims = {place.name.split(".", 2)[2]: place.dims for place in own}
    if "attn_kv_a_mqa.weight" in dims:
        return dims["attn_kv_a_mqa.weight"][1]
    if "attn_k.weight" in dims and "attn_v.weight" in dims:
        return dims["attn_k.weight"][1] + dims["attn_v.weight"][1]
    if "attn_qkv.weight" in dims:
        return dims["attn_qkv.weight"][1] - dims["attn_output.weight"][0]
    return 0


def _window(file: GgufFile, index: int) -> int | None:
    """gpt-oss alternates between a window and everything; of other architectures no window is counted."""
    if file.metadata.get("general.architecture") != "gpt-oss" or index % 2:
        return None
    return _number(file, "attention.sliding_window")


def _notes(file: GgufFile, kind: str, further: int) -> tuple[str, ...]:
    notes = [f"{further} layer(s) that only predict further tokens are left out"] if further else []
    if kind != "gpt-oss" and file.metadata.get(f"{kind}.attention.sliding_window"):
        notes.append("its attention has a window, which is not counted: keys and values are those of all tokens")
    if any(".ssm_" in name for name in file.tensors):
        notes.append("states of its recurrent layers are not counted")
    return tuple(notes)


def _number(file: GgufFile, name: str) -> int:
    key = f"{file.metadata.get('general.architecture')}.{name}"
    value = file.metadata.get(key)
    if not isinstance(value, int) or not 0 < value < 2**20:
        raise MoebenchError(f"{file.path} says nothing sensible of {key}; convert the model again.")
    return value
