"""What the config.json of a transformers MoE model says about its MoE layers. Imports no torch.

Facts of the architectures are those of transformers 5.23 (its configuration and modeling files).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError, Selection, make_key, unknown
from ...moe.shapes import ModelShape

Config = Mapping[str, Any]

SAFE = ("*.safetensors",)


def read_config(folder: Path, kinds: Sequence[str] = SAFE) -> dict[str, Any]:
    """Return the config.json of a local folder with weights of ``kinds``, or raise a sentence that says what is wrong.

    Pickles are named as the way out where there is nothing else.
    """
    if not folder.is_dir():
        remedy = f"download the model (hf download {folder} --local-dir DIR) and give that folder as path."
        raise MoebenchError(f"'{folder}' is no local folder; {remedy}")
    if not (folder / "config.json").is_file() or not weight_files(folder, kinds):
        if weight_files(folder, ("*.bin",)):
            raise MoebenchError(f"{folder} has weights as pickles alone; add model.pickle=true if you trust them.")
        raise MoebenchError(f"{folder} lacks config.json or *.safetensors; give a folder that save_pretrained wrote.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoebenchError(f"{folder / 'config.json'} is no valid JSON ({error}); download it again.") from error
    if not isinstance(config, dict) or config.get("model_type") not in READERS:
        name = config.get("model_type") if isinstance(config, dict) else None
        raise MoebenchError(unknown("MoE architecture (model_type)", str(name), READERS))
    if config.get("quantization_config"):
        raise MoebenchError(f"the weights in {folder} are quantized already; give a folder of plain weights.")
    return config


def weight_files(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Return the files of the first of ``kinds`` (glob patterns) that the folder has any of."""
    return next((found for kind in kinds if (found := sorted(folder.glob(kind)))), [])


def read_shape(folder: Path, kinds: Sequence[str] = SAFE) -> ModelShape:
    """Return the sizes of the MoE layers of the model in ``folder``."""
    config = read_config(folder, kinds)
    try:
        return shape_of(config)
    except KeyError as error:
        raise MoebenchError(
            f"config.json in {folder} does not say {error}; save it with transformers again."
        ) from error


def shape_of(config: Config) -> ModelShape:
    """Return the sizes of the MoE layers that a configuration describes; KeyError names what it lacks."""
    return READERS[config["model_type"]](config)


def weights_sha256(folder: Path, kinds: Sequence[str] = SAFE) -> str:
    """Return one hash of the content of all files with weights, by name; each file is read once per process."""
    read_config(folder, kinds)
    found = {}
    for file in weight_files(folder, kinds):
        stat = file.stat()
        found[file.name] = file_sha256(file, stat.st_size, stat.st_mtime_ns)
    return make_key(found)


@cache
def file_sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of a file's content, read once as long as its size and its time are these."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shape(
    config: Config, width: str, selection: Selection, moe_layers: tuple[int, ...], shared: int = 0
) -> ModelShape:
    return ModelShape(
        hidden=config["hidden_size"],
        width=config[width],
        experts=_experts(config),
        layers=config["num_hidden_layers"],
        moe_layers=moe_layers,
        selection=selection,
        shared_width=shared,
        activation=config["hidden_act"],
    )


def _experts(config: Config) -> int:
    """Return the number of routed experts under whichever name the configuration has it."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if name in config:
            return int(config[name])
    raise KeyError("num_experts")


def _every(config: Config) -> tuple[int, ...]:
    return tuple(range(config["num_hidden_layers"]))


def _renormalised(config: Config) -> ModelShape:
    """Mixtral and GraniteMoE: softmax over the selected logits."""
    selection = Selection("softmax", config["num_experts_per_tok"], True)
    return _shape(config, "intermediate_size", selection, _every(config))


def _olmoe(config: Config) -> ModelShape:
    selection = Selection("softmax", config["num_experts_per_tok"], config["norm_topk_prob"])
    return _shape(config, "intermediate_size", selection, _every(config))


def _qwen(config: Config) -> ModelShape:
    """Qwen2-MoE and Qwen3-MoE: some layers may be dense; the former has a gated shared expert."""
    selection = Selection("softmax", config["num_experts_per_tok"], config["norm_topk_prob"])
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    moe_layers = tuple(i for i in _every(config) if i not in dense and (i + 1) % step == 0)
    shared = config.get("shared_expert_intermediate_size", 0)
    return _shape(config, "moe_intermediate_size", selection, moe_layers, shared)


def _deepseek_v2(config: Config) -> ModelShape:
    if config.get("topk_method", "greedy") != "greedy":
        raise MoebenchError("only DeepSeek-V2 models with topk_method=greedy (such as V2-Lite) can be read.")
    scale = config["routed_scaling_factor"]
    selection = Selection("softmax", config["num_experts_per_tok"], config["norm_topk_prob"], scale)
    return _deepseek(config, selection)


def _deepseek_v3(config: Config) -> ModelShape:
    groups = (config["n_group"], config["topk_group"])
    scale, renormalize = config["routed_scaling_factor"], config["norm_topk_prob"]
    return _deepseek(config, Selection("sigmoid", config["num_experts_per_tok"], renormalize, scale, True, groups))


def _deepseek(config: Config, selection: Selection) -> ModelShape:
    moe_layers = _every(config)[config["first_k_dense_replace"] :]
    shared = (config["n_shared_experts"] or 0) * config["moe_intermediate_size"]
    return _shape(config, "moe_intermediate_size", selection, moe_layers, shared)


READERS: dict[str, Callable[[Config], ModelShape]] = {
    "mixtral": _renormalised,
    "granitemoe": _renormalised,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
"""What can be read, by ``model_type``."""
