"""What files of tensors say of their sizes: safetensors headers and indices, read without their weights."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError
from .counts import PARTS

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100 * 2**20
"""Bytes; the format allows no longer one."""

PATTERNS: tuple[tuple[str, str], ...] = (
    ("shared", r"shared_expert|shared_mlp"),
    ("rest", r"norm\.(weight|bias)$|router|gate\.(weight|bias|e_score|moe_statics)|norm_\d\.|e_score_correction"),
    ("experts", r"\.experts\.|block_sparse_moe\.(input|output)_linear"),
    ("attention", r"attn|attention|mamba"),
    ("embedding", r"embed_tokens|lm_head|wte"),
    ("dense", r"\.(mlp|feed_forward|ffn)\."),
)
"""Which part a tensor belongs to: the first pattern that is found in its name; ``rest`` where none is."""
QK_NORMS = re.compile(r"(attn|attention|mamba)\.[\w.]*norm")
BESIDE = re.compile(r"(^|\.)(mtp[._]|vision_|visual\.|audio_|multi_modal_projector\.)")
"""What lies beside the language model: layers for further tokens by their own name, and what sees or hears."""
LAYER = re.compile(r"\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """Return the part of a model that a tensor of transformers belongs to."""
    if QK_NORMS.search(name):
        return "attention"
    return next((part for part, pattern in PATTERNS if re.search(pattern, name)), "rest")


def parts_of(sizes: Mapping[str, int], layers: int) -> tuple[dict[str, int], int]:
    """Return bytes by part, and those that no text needs: layers that only predict further tokens, and other senses."""
    parts, beyond = dict.fromkeys(PARTS, 0), 0
    for name, size in sizes.items():
        found = LAYER.search(name)
        if BESIDE.search(name) or (found and int(found[1]) >= layers):
            beyond += size
        else:
            parts[part_of(name)] += size
    return parts, beyond


def header_sizes(files: Iterable[Path]) -> dict[str, int]:
    """Return the bytes of every tensor of safetensors files; MoebenchError where a file is none."""
    sizes: dict[str, int] = {}
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LONGEST_HEADER:
                raise ValueError("its header is too long")
            found = json.loads(stream.read(length))
        if not all(_has_place(entry) for name, entry in found.items() if name != "__metadata__"):
            raise ValueError("a tensor has no place")
        return dict(found)
    except OSError as error:
        raise MoebenchError(f"{file} cannot be read ({error.strerror}); fetch it again.") from None
    except (ValueError, struct.error, AttributeError, RecursionError) as error:
        raise MoebenchError(f"{file} is no safetensors file ({error}); fetch it again.") from None


def _has_place(entry: Any) -> bool:
    place = entry.get("data_offsets")
    return (
        isinstance(place, list)
        and len(place) == 2
        and all(type(one) is int for one in place)
        and 0 <= place[0] <= place[1]
    )


def index_total(index: Mapping[str, Any]) -> int | None:
    """Return the bytes of all tensors that an index tells, None where it does not."""
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, int | float) and 0 < total < 2**63 else None
