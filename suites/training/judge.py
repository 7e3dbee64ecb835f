"""What a trained MoE language model is worth: against 3-grams, and whether its experts specialise.

All figures are of held-out text. The 3-grams predict the very tokens, or their bytes, that the model predicts, from
what is before them in the window. Shape letters: N tokens, B windows, T tokens of one window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contracts import Metric, Series
from ..models import substream
from .language import Windows, bits_per_byte, gates
from .ngrams import Trigrams
from .specialisation import Information, Pruning, classes_of, information, pruning, routes

PRUNED = 0.25
"""Of the experts of every layer."""


@dataclass(frozen=True)
class Judgement:
    """Bits per byte of a model and of 3-grams of its tokens and of bytes, over ``tokens`` predicted tokens.

    ``experts`` is what is known of these, None of a dense model.
    """

    bits_per_byte: float
    token_trigram: float
    byte_trigram: float
    tokens: int
    experts: Specialisation | None

    def metrics(self) -> list[Metric]:
        """Return all figures; those of layers as means over layers."""
        names = ("bits_per_byte", "token_trigram", "byte_trigram")
        own = [Metric(name, getattr(self, name), "bit/byte", n=self.tokens) for name in names]
        return own if self.experts is None else [*own, *self.experts.metrics()]

    def series(self) -> list[Series]:
        """Return what is known of each layer."""
        return [] if self.experts is None else self.experts.series()


@dataclass(frozen=True)
class Specialisation:
    """Whether experts have different work, and what the busiest are worth.

    ``information``, that of the ``untrained`` model, and ``loads`` (shares of the assignments) are by layer: a router
    of random weights knows tokens apart, too, so it is above the untrained one that training shows.
    """

    information: Mapping[int, Information]
    untrained: Mapping[int, Information]
    loads: Mapping[int, tuple[float, ...]]
    pruning: Pruning

    def metrics(self) -> list[Metric]:
        """Return all figures; those of layers as means over layers."""
        cut, layers, before = self.pruning, list(self.information.values()), list(self.untrained.values())
        mean = sum(cut.random) / len(cut.random)
        harm = {"busiest": cut.busiest - cut.whole, "random": mean - cut.whole}
        return [
            Metric("routing_information", sum(one.bits for one in layers) / len(layers), "bit"),
            Metric("routing_information_untrained", sum(one.bits for one in before) / len(before), "bit"),
            Metric("routing_information_shuffled", sum(one.shuffled_mean for one in layers) / len(layers), "bit"),
            Metric("pruning_busiest_harm", harm["busiest"], "bit/byte"),
            Metric("pruning_random_harm", harm["random"], "bit/byte", n=len(cut.random)),
            Metric("pruning_random_worst_harm", max(cut.random) - cut.whole, "bit/byte", n=len(cut.random)),
        ]

    def series(self) -> list[Series]:
        """Return what is known of each layer."""
        kinds = {
            "bits": [one.bits for one in self.information.values()],
            "untrained": [one.bits for one in self.untrained.values()],
            "shuffled_max": [one.shuffled_max for one in self.information.values()],
        }
        found = [Series(f"routing_information_{name}", tuple(values), "bit") for name, values in kinds.items()]
        return [*found, *(Series("expert_load", load, "1", layer=layer) for layer, load in self.loads.items())]


def judge(
    model: Any, untrained: Any, tokenizer: Any, ids_N: Tensor, judged: Windows, watched: Windows, seed: int
) -> Judgement:
    """Judge a model that was trained on ``ids_N``; experts are pruned on the windows ``watched`` alone."""
    found = specialisation(model, untrained, tokenizer, judged, watched, seed) if gates(model) else None
    trigrams = trigram_bits(tokenizer, ids_N, judged)
    return Judgement(bits_per_byte(model, judged), *trigrams, tokens=judged.ids_BT[:, 1:].numel(), experts=found)


def specialisation(
    model: Any, untrained: Any, tokenizer: Any, judged: Windows, watched: Windows, seed: int
) -> Specialisation:
    """Return what routing knows of ``judged`` tokens, and what the experts are worth on the windows ``watched``."""
    experts = next(iter(gates(model).values())).num_experts
    routed, before = (routes(one, judged.ids_BT[:, :-1]) for one in (model, untrained))
    class_T = classes_of(tokenizer, judged.ids_BT[:, :-1].flatten())
    told, told_before = (
        {
            layer: information(one_TK, class_T, experts, substream(seed, "information", layer))
            for layer, one_TK in by_layer.items()
        }
        for by_layer in (routed, before)
    )
    counts = {layer: torch.bincount(one_TK.flatten(), minlength=experts) for layer, one_TK in routed.items()}
    return Specialisation(
        information=told,
        untrained=told_before,
        loads={layer: tuple((count_E / count_E.sum()).tolist()) for layer, count_E in counts.items()},
        pruning=pruning(model, watched, counts, PRUNED, seed),
    )


def trigram_bits(tokenizer: Any, ids_N: Tensor, judged: Windows) -> tuple[float, float]:
    """Return bits per byte of 3-grams of tokens and of bytes, trained on ``ids_N``."""
    by_token = Trigrams(ids_N.tolist(), len(tokenizer))
    by_byte = Trigrams(list(text_bytes(tokenizer, ids_N)), 256)
    token_bits = byte_bits = 0.0
    for ids_T in judged.ids_BT:
        token_bits += by_token.bits(ids_T.tolist())
        known = len(text_bytes(tokenizer, ids_T[:1]))
        byte_bits += by_byte.bits(list(text_bytes(tokenizer, ids_T)), known)
    return token_bits / judged.bytes, byte_bits / judged.bytes


def text_bytes(tokenizer: Any, ids_N: Tensor) -> bytes:
    """Return the bytes that tokens of a byte-level BPE stand for, parts of characters included."""
    alphabet = byte_alphabet()
    names = tokenizer.convert_ids_to_tokens(ids_N.tolist())
    special = set(tokenizer.all_special_tokens)
    return bytes(alphabet[letter] for name in names if name not in special for letter in name)


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE: printable Latin-1 is itself, the rest follows from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
