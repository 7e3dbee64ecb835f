"""Recording who goes where while a language model generates: the prompt, then one token a step.

Imported by recording processes only. Shape letters: T tokens of a call, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...contracts import Case, MoebenchError, Registry
from ...moe.routing import Routing
from ..decoding import cache_name
from ..digest import sha256_of
from ..trace import columns_of
from .watch import Watch, exchanged_layers, own_layers

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recording:
    """The columns of a trace and of its hints (None where no router made a guess), and what to say of them.

    ``ids_S`` are the tokens that the model read: the prompt, then one for each step.
    """

    columns: dict[str, Any]
    hints: dict[str, Any] | None
    ids_S: Tensor
    facts: dict[str, Any]


def watching(model: Any, case: Case, registry: Registry) -> AbstractContextManager[Watch]:
    """Return what watches the case's layers: the model's own, or what the case makes of its FFNs."""
    return (own_layers if runs_as_it_is(case, registry) else exchanged_layers)(model, case, registry)


def runs_as_it_is(case: Case, registry: Registry) -> bool:
    """Whether the case changes nothing of the model's experts, so that its weights need no second copy."""
    has_experts = bool(registry.params("model", case.model).shape().experts)
    return has_experts and {case.structure.name, case.quantization.name} == {"none"}


@torch.inference_mode()
def record(
    model: Any,
    watch: Watch,
    prompt_S: Tensor,
    steps: int,
    text_S: Tensor | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Return what the layers of ``watch`` do at the prompt (step 0) and at ``steps`` tokens after it, one a step.

    These are the tokens of ``text_S`` where it is given, else those that the model finds likeliest (greedy decoding,
    which goes on after an end of text, so that a trace has the length that was asked for). Attention keeps its keys and
    values. Hints are the guesses of ``Watch.expected``.
    """
    from transformers import DynamicCache

    check_length(model, len(prompt_S), steps)
    places: list[tuple[int, int, Routing]] = []
    guesses: list[tuple[int, int, Routing]] = []
    ids_1T, read = prompt_S[None], [prompt_S]
    cache = {cache_name(model): DynamicCache(config=model.config)}
    for step in range(steps + 1):
        watch.begin(ids_1T)
        output = model(input_ids=ids_1T, use_cache=True, **cache)
        places += [(step, layer, routing) for layer, routing in watch.asked()]
        guesses += [(step, layer, routing) for layer, routing in watch.expected(ids_1T)]
        if progress is not None and (step % 32 == 0 or step == steps):
            progress(f"recorded {step} of {steps} steps")
        if step < steps:
            next_1 = output.logits[0, -1].argmax()[None] if text_S is None else text_S[step : step + 1]
            ids_1T = next_1[None]
            read.append(next_1)
    ids_S = torch.cat(read)
    facts = {
        "made": "recorded",
        "mode": "greedy" if text_S is None else "text",
        "prompt_tokens": len(prompt_S),
        "experts": watch.experts,
        "ids_sha256": sha256_of(ids_S),
    }
    return Recording(columns_of(places), columns_of(guesses) if guesses else None, ids_S, facts)


def check_length(model: Any, prompt: int, steps: int) -> None:
    """Raise MoebenchError where a recording has no prompt, or more tokens than the model has positions."""
    if not prompt:
        raise MoebenchError("the prompt has no token; give some text.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt + steps > positions:
        raise MoebenchError(
            f"{prompt} tokens of the prompt and {steps} steps are more than the model's {positions} positions; lower "
            "--tokens."
        )
