"""The attention of a case's changed layers with inputs of its projections left out. Imported by workers only.

Shape letters: T tokens, I inputs of a projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...contracts import Case, MoebenchError, Registry, make_key
from ...moe.sparsifiers.attention import projection_rule
from ..digest import sha256_of
from ..models import cache_dir, substream
from ..models.cache import make_once
from ..models.smollm2_jobs import recording_window, token_ids
from ..models.tensors import read_checked, save_checked
from ..text import calibration_text
from .attention import QuantizedAttention, attention_maps
from .language_model import language_model
from .projections import LayerProjections, Projection

if TYPE_CHECKING:
    from .block import MoEBlock

READERS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
"""Whose input each projection reads: q, k and v have one."""


class SparseAttention:
    """The projections of the layers of ``blocks``, by decoder index; no layer but where the case's sparsity says so.

    Rules are calibrated on what the projections read in the dense model, with the weights that are multiplied: those
    that ``quantized`` puts in the place of the model's.
    """

    def __init__(
        self,
        case: Case,
        registry: Registry,
        model: Any,
        blocks: Mapping[int, MoEBlock],
        quantized: QuantizedAttention,
    ) -> None:
        params = registry.params("sparsity", case.sparsity)
        names = tuple(getattr(params, "attention_scores", ())) if getattr(params, "level", 0) > 0 else ()
        self.layers: dict[int, LayerProjections] = {}
        if not names or not blocks:
            return
        maps = {index: attention_maps(model, index) for index in blocks}
        _check_named(maps, names)
        source = next(iter(blocks.values())).subject.source
        inputs = calibration_inputs(case, source, model, tuple(blocks))
        with quantized.applied(), torch.no_grad():
            for index, block in blocks.items():
                found: dict[str, Projection] = {}
                for name in names:
                    linear = maps[index][name]
                    rule = projection_rule(params, name, linear.weight, inputs[f"{index}.{READERS[name]}"])
                    if rule is not None:
                        nbytes = quantized.nbytes_of(linear)
                        found[name] = Projection(name, linear, rule, nbytes, block.first_tokens)
                rest = sum(quantized.nbytes_of(linear) for name, linear in maps[index].items() if name not in found)
                self.layers[index] = block.projections = LayerProjections(found, rest)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let all layers leave out inputs until the block ends."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.applied())
            yield

    def follow(self, other: SparseAttention) -> None:
        """Use the channels that ``other`` used in its last pass, so that rounding decides about none."""
        for index, layer in self.layers.items():
            for name, one in layer.projections.items():
                last = other.layers[index].projections[name].last
                one.forced = None if last is None else last.mask()


def _check_named(maps: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> None:
    for index, found in maps.items():
        absent = [name for name in names if name not in found]
        if absent:
            raise MoebenchError(f"the attention of layer {index} has no map '{absent[0]}'; give attention=false.")


def calibration_inputs(case: Case, source: Any, model: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return what q_proj and o_proj of ``layers`` read in the dense model, by ``INDEX.NAME``: [T, I] float32.

    The tokens are those on which the layers' experts are calibrated, of the calibration text, in the same windows;
    made once per model, tokens and layers.
    """
    import transformers

    tokenizer = language_model(case, source)[1]
    seed = substream(case.seed, "calibration")
    part = source.place("calibration", int(case.calibration.get("tokens", 1024)), seed)
    ids_T = token_ids(tokenizer, calibration_text(), part.stop)
    versions = [torch.__version__, transformers.__version__]
    told = ["attention", case.weights_sha256, sha256_of(ids_T), part.start, recording_window(model), list(layers)]
    file = cache_dir() / "quality" / f"{make_key([*told, versions])[:32]}.safetensors"
    return read_checked(make_once(file, lambda target: _record(model, ids_T, part.start, layers, target)))


@torch.no_grad()
def _record(model: Any, ids_T: Tensor, start: int, layers: Sequence[int], target: Path) -> None:
    """Write what the projections read of the tokens from ``start`` on; windows before these are not run."""
    window = recording_window(model)
    skipped = start // window * window
    caught: dict[str, list[Tensor]] = {f"{index}.{name}": [] for index in layers for name in set(READERS.values())}
    hooks = []
    try:
        for key, parts in caught.items():
            index, name = key.split(".")
            hooks.append(attention_maps(model, int(index))[name].register_forward_pre_hook(_into(parts)))
        for ids in torch.split(ids_T[skipped:], window):
            model.model(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    save_checked({key: torch.cat(parts)[start - skipped :] for key, parts in caught.items()}, target)


def _into(parts: list[Tensor]) -> Callable[[Any, Any], None]:
    return lambda module, inputs: parts.append(inputs[0][0].clone())
