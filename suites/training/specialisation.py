"""Whether experts specialise: routing against classes of tokens, and what busy experts are worth.

Shape letters: B windows, T tokens, N assignments, E experts, C classes, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import substream
from .language import Windows, bits_per_byte, gates

CLASSES = ("begins a word", "begins a name", "inside a word", "number", "punctuation", "space")
PERMUTATIONS = 200
DRAWS = 20


@dataclass(frozen=True)
class Information:
    """Mutual information of expert and class of one layer in bits, and of PERMUTATIONS shuffles of the classes."""

    bits: float
    shuffled_mean: float
    shuffled_max: float


@dataclass(frozen=True)
class Pruning:
    """Bits per byte of the whole model, without the busiest experts of every layer, and without as many random ones."""

    whole: float
    busiest: float
    random: tuple[float, ...]


def token_class(text: str) -> int:
    """Return the class of a token by what it stands for; a leading space belongs to a word."""
    bare = text.strip()
    if not bare:
        return CLASSES.index("space")
    if bare[0].isdigit():
        return CLASSES.index("number")
    if not bare[0].isalpha():
        return CLASSES.index("punctuation")
    if not text[0].isspace():
        return CLASSES.index("inside a word")
    return CLASSES.index("begins a name" if bare[0].isupper() else "begins a word")


def classes_of(tokenizer: Any, ids_N: Tensor) -> Tensor:
    """Return the class of every token, int64."""
    kinds = {i: token_class(tokenizer.decode([i])) for i in set(ids_N.tolist())}
    return torch.tensor([kinds[i] for i in ids_N.tolist()])


@torch.no_grad()
def routes(model: Any, ids_BT: Tensor) -> dict[int, Tensor]:
    """Return the experts of each token by layer, [B * T, K], on the CPU."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in gates(model)}
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for layer, gate in gates(model).items():
            hook = gate.register_forward_hook(lambda m, i, output, parts=found[layer]: parts.append(output[2].cpu()))
            stack.callback(hook.remove)
        for ids_T in ids_BT:
            model.model(ids_T[None].to(device), use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def information(experts_TK: Tensor, class_T: Tensor, experts: int, seed: int) -> Information:
    """Return what the class of a token tells of its experts, beside shuffled classes."""
    rng = torch.Generator().manual_seed(seed)
    shuffles = [class_T[torch.randperm(len(class_T), generator=rng)] for _ in range(PERMUTATIONS)]
    shuffled = [mutual_bits(joint_counts(experts_TK, one_T, experts)) for one_T in shuffles]
    own = mutual_bits(joint_counts(experts_TK, class_T, experts))
    return Information(own, sum(shuffled) / len(shuffled), max(shuffled))


def joint_counts(experts_TK: Tensor, class_T: Tensor, experts: int) -> Tensor:
    """Return how many assignments each pair of class and expert has, float64 [C, E]."""
    cell_TK = class_T[:, None] * experts + experts_TK
    return torch.bincount(cell_TK.flatten(), minlength=len(CLASSES) * experts).view(len(CLASSES), experts).double()


def mutual_bits(joint_CE: Tensor) -> float:
    """Return the mutual information of rows and columns of a table of counts, in bits."""
    p_CE = joint_CE / joint_CE.sum()
    independent_CE = p_CE.sum(1, keepdim=True) * p_CE.sum(0, keepdim=True)
    seen = p_CE > 0
    return float((p_CE[seen] * (p_CE[seen] / independent_CE[seen]).log2()).sum())


def pruning(model: Any, held_out: Windows, loads: Mapping[int, Tensor], fraction: float, seed: int) -> Pruning:
    """Return what it costs to take away a fraction of the experts of every layer; ``loads`` are counts_E by layer.

    The router chooses among those that are left, with as many experts for each token as before.
    """
    count = max(1, round(fraction * len(next(iter(loads.values())))))
    busiest = {layer: load_E.argsort(descending=True)[:count].tolist() for layer, load_E in loads.items()}
    random = []
    for draw in range(DRAWS):
        rng = torch.Generator().manual_seed(substream(seed, "pruning", draw))
        gone = {layer: torch.randperm(len(load_E), generator=rng)[:count].tolist() for layer, load_E in loads.items()}
        random.append(without(model, gone, held_out))
    return Pruning(bits_per_byte(model, held_out), without(model, busiest, held_out), tuple(random))


def without(model: Any, gone: Mapping[int, Sequence[int]], held_out: Windows) -> float:
    """Return bits per byte where the experts ``gone`` of each layer are never chosen."""
    with _excluded(model, gone):
        return bits_per_byte(model, held_out)


@contextlib.contextmanager
def _excluded(model: Any, gone: Mapping[int, Sequence[int]]) -> Iterator[None]:
    def choose_again(gate: Any, inputs: Any, output: tuple[Tensor, ...], ids: Sequence[int]) -> tuple[Tensor, ...]:
        logits_TE = output[0].clone()
        logits_TE[:, list(ids)] = -torch.inf
        weights_TK, indices_TK = logits_TE.float().softmax(-1).topk(gate.top_k, dim=-1)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), indices_TK

    with contextlib.ExitStack() as stack:
        for layer, gate in gates(model).items():
            hook = gate.register_forward_hook(lambda m, i, o, ids=gone[layer]: choose_again(m, i, o, ids))
            stack.callback(hook.remove)
        yield
