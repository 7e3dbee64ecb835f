"""MoE layers of a transformers model in a local folder, one at a time, straight from its safetensors files.

Shape letters: E experts, F expert width, S width of the shared expert, H hidden.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...contracts import MoebenchError
from ...moe.layer import LayerWeights, SharedExpert
from ...moe.shapes import ModelShape
from ..model_plugins import TOKENIZERS, HuggingFace
from .fetch import Progress
from .recorded import Recorded, to_stderr

EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Gate, up and down of one expert: most models, and Mixtral."""

FUSED_NAMES = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("input_linear.weight", "output_linear.weight"),
)
"""All experts in one tensor [E, 2F, H] and one [E, H, F]: transformers in memory, and GraniteMoE."""

ROUTER_NAMES = ("gate.weight", "router.layer.weight")
SHARED_NAMES = ("shared_experts", "shared_expert")
BLOCK_NAMES = ("mlp", "block_sparse_moe")


class Folder(Protocol):
    """The parameters of a model in a transformers folder."""

    def shape(self) -> ModelShape:
        """Return the sizes."""

    def weights_sha256(self) -> str:
        """Return the identity of the weights."""

    def folder(self) -> Path:
        """Return the folder with config.json and safetensors."""

    def home(self) -> Path:
        """Return where the cache keeps what is made of the model."""


class HuggingFaceModel(Recorded):
    """A ModelSource that maps the tensors of the layer that is asked for, in the dtype in which they are stored.

    The whole model is loaded in float32, whatever it is stored in: rounding of the layers around is no part of a
    method.
    """

    def __init__(self, params: Folder, name: str = "hf", progress: Progress = to_stderr) -> None:
        self.params = params
        self.calibration_tokens = getattr(params, "calibration_tokens", Recorded.calibration_tokens)
        super().__init__(name, progress)

    @cached_property
    def shape(self) -> ModelShape:  # type: ignore[override]  # read when it is first asked for, and kept
        """Sizes, from config.json."""
        return self.params.shape()

    def identity(self) -> str:
        """Return the hash of all files with weights."""
        return self.params.weights_sha256()

    def home(self) -> Path:
        """Return where the cache keeps what is made of the model."""
        return self.params.home()

    @cached_property
    def folder(self) -> Path:
        """The folder with config.json and safetensors."""
        return self.params.folder()

    def convert(self) -> Path:
        """Return the model's own folder; MoebenchError where it has no tokenizer to give text to."""
        if not any((self.folder / name).is_file() for name in TOKENIZERS):
            raise MoebenchError(f"{self.folder} has no tokenizer; save it there too, or use traffic=gaussian.")
        return self.folder

    def layer(self, index: int) -> LayerWeights:
        """Return experts [E, 2F, H] and [E, H, F], the router and any shared expert, or the FFN of a dense model.

        Fused tensors are mapped; experts that lie one by one are copied together.
        """
        if index not in self.shape.moe_layers:
            raise MoebenchError(f"layer {index} holds no experts; choose among {list(self.shape.moe_layers)}.")
        tensors = self._layer_tensors(index)
        if not self.shape.experts:
            gate_FH, up_FH, down_HF = (tensors[f"{part}.weight"] for part in EXPERT_NAMES[0])
            return LayerWeights(torch.cat([gate_FH, up_FH]), down_HF, activation=self.shape.activation)
        gate_up, down = self._experts(tensors)
        return LayerWeights(
            gate_up,
            down,
            _first(tensors, ROUTER_NAMES),
            tensors.get("gate.e_score_correction_bias"),
            self._shared(tensors),
            self.shape.activation,
        )

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Which file holds a tensor, from the index or, without one, from the files."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        found = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with _open(file) as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        return found

    def _layer_tensors(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of the MoE block of one layer, by their name inside the block."""
        prefixes = tuple(f"model.layers.{index}.{block}." for block in BLOCK_NAMES)
        names = {name: file for name, file in self._file_of.items() if name.startswith(prefixes)}
        found: dict[str, Tensor] = {}
        for file in sorted(set(names.values())):
            with _open(file) as opened:
                for name in (name for name, place in names.items() if place == file):
                    found[name.split(".", 4)[4]] = opened.get_tensor(name)
        return found

    def _experts(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for fused_names in FUSED_NAMES:
            if fused_names[0] in tensors:
                return tensors[fused_names[0]], tensors[fused_names[1]]
        for gate, up, down in EXPERT_NAMES:
            if f"experts.0.{gate}.weight" in tensors:
                gates, ups, downs = (
                    [tensors[f"experts.{expert}.{part}.weight"] for expert in range(self.shape.experts)]
                    for part in (gate, up, down)
                )
                return _joined(gates, ups), torch.stack(downs)
        raise MoebenchError(f"{self.folder} names its expert weights in an unknown way; save it with transformers.")

    def _shared(self, tensors: dict[str, Tensor]) -> SharedExpert | None:
        for name in SHARED_NAMES:
            if f"{name}.gate_proj.weight" in tensors:
                gate_SH, up_SH, down_HS = (tensors[f"{name}.{part}.weight"] for part in EXPERT_NAMES[0])
                gate_1H = tensors.get("shared_expert_gate.weight")
                gate_H = None if gate_1H is None else gate_1H[0]
                return SharedExpert(torch.cat([gate_SH, up_SH]), down_HS, gate_H, self.shape.activation)
        return None


def _joined(gates: list[Tensor], ups: list[Tensor]) -> Tensor:
    """Return [E, 2F, H] of E gates and E ups, without a second copy of either."""
    width, hidden = gates[0].shape
    gate_up_E2FH = gates[0].new_empty(len(gates), 2 * width, hidden)
    for expert, (gate_FH, up_FH) in enumerate(zip(gates, ups, strict=True)):
        gate_up_E2FH[expert, :width] = gate_FH
        gate_up_E2FH[expert, width:] = up_FH
    return gate_up_E2FH


def _first(tensors: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise MoebenchError(f"the layer has no router named {' or '.join(names)}; save the model with transformers.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MoebenchError(f"{file} cannot be read ({error}); download it again.") from error


def build(params: HuggingFace) -> HuggingFaceModel:
    """Return the model; nothing is opened before a layer is asked for."""
    return HuggingFaceModel(params)
