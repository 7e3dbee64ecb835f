"""Task ``answers``: extractive questions, known and unseen, for a dense or a switch-MoE encoder, with EDA or without.

After Robust QA with mixtures of experts (arXiv 2204.09598), which adds augmented out-of-domain examples to DistilBERT
with experts; here everything is synthetic and small. Shape letters: B examples, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import Check, Metric
from ..models import substream
from .judged import Judged, exact_match, f1, items_of, mean
from .questions import KNOWN, NAMES, NEW_NAMES, UNSEEN, Example, augmented, example, vocabulary
from .reader import EXPERTS, Reader, SwitchFfn

STEPS, BATCH, RATE, BALANCE = 400, 32, 0.002, 0.01
JUDGED = 400
LONGEST = 4
"""Most words that an answer may have."""

BOUND = 1e-4


def judge(workload: Mapping[str, Any], seed: int) -> Judged:
    """Train by ``workload['method']`` on known templates, and judge on known and on unseen ones."""
    words = vocabulary()
    experts = EXPERTS if workload["method"].startswith("moe") else 1
    model = Reader(len(words) + 1, experts, words["?"])
    train(model, words, workload["method"].endswith("_eda"), workload["steps"] or STEPS, seed)
    return judged(model.eval(), words, seed)


def train(model: Reader, words: Mapping[str, int], eda: bool, steps: int, seed: int) -> None:
    """Take ``steps`` batches of new examples; with ``eda`` half of each is changed."""
    rng = random.Random(substream(seed, "questions"))
    changes = random.Random(substream(seed, "changes"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        batch = [example(rng, KNOWN, NAMES) for _ in range(BATCH)]
        if eda:
            batch = [augmented(changes, one) if place % 2 else one for place, one in enumerate(batch)]
        logits_B2T = model(numbered(batch, words))
        truth_B2 = torch.tensor([[one.start, one.end] for one in batch])
        loss = nnf.cross_entropy(logits_B2T.flatten(0, 1), truth_B2.flatten()) + BALANCE * model.balance()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def numbered(batch: Sequence[Example], words: Mapping[str, int]) -> Tensor:
    """Return the words of a batch as numbers, [B, T] int64, filled up with 0."""
    longest = max(len(one.words) for one in batch)
    rows = [[words[word] for word in one.words] + [0] * (longest - len(one.words)) for one in batch]
    return torch.tensor(rows)


@torch.no_grad()
def judged(model: Reader, words: Mapping[str, int], seed: int) -> Judged:
    """Return exact match and F1 on known templates and names, on unseen templates, and on unseen names besides."""
    kinds = {"known": (KNOWN, NAMES), "unseen": (UNSEEN, NAMES), "unseen_names": (UNSEEN, NEW_NAMES)}
    metrics: list[Metric] = []
    values: dict[str, list[float]] = {}
    checks = []
    for kind, (templates, names) in kinds.items():
        rng = random.Random(substream(seed, "judged", kind))
        batch = [example(rng, templates, names) for _ in range(JUDGED)]
        logits_B2T = model(numbered(batch, words))
        answers = [" ".join(one.words[a : b + 1]) for one, (a, b) in zip(batch, spans(logits_B2T), strict=True)]
        for name, score in (("exact_match", exact_match), ("f1", f1)):
            found = [score(answer, one.answer) for answer, one in zip(answers, batch, strict=True)]
            values[f"{kind}_{name}"] = found
            metrics.append(mean(f"{kind}_{name}", torch.tensor(found), substream(seed, "bootstrap", kind, name)))
        checks.append(check(model, batch, words, logits_B2T))
    worst = max(checks, key=lambda one: (not one.ok, one.error or 0.0))
    return Judged(metrics, items_of("answers", values), worst)


def spans(logits_B2T: Tensor) -> list[tuple[int, int]]:
    """Return first and last place of the likeliest answer of at most ``LONGEST`` words in each row."""
    start_BT, end_BT = logits_B2T.log_softmax(-1).unbind(1)
    pair_BTT = start_BT[:, :, None] + end_BT[:, None, :]
    allowed_TT = torch.ones(pair_BTT.shape[1:], dtype=torch.bool).triu().tril(LONGEST - 1)
    place_B = pair_BTT.masked_fill(~allowed_TT, -torch.inf).flatten(1).argmax(1)
    length = logits_B2T.shape[-1]
    return [(place // length, place % length) for place in place_B.tolist()]


def check(model: Reader, batch: Sequence[Example], words: Mapping[str, int], logits_B2T: Tensor) -> Check:
    """Compare with the first examples read one at a time in float64, whose first FFN is also computed token by token.

    Nothing may depend on what fills a batch up; a number that is none, anywhere, fails.
    """
    double = Reader(len(words) + 1, model.ffns[0].experts, model.mark).double()  # type: ignore[arg-type]  # a SwitchFfn
    double.load_state_dict(model.state_dict())
    first: SwitchFfn = double.ffns[0]  # type: ignore[assignment]
    seen: dict[str, Tensor] = {}
    first.register_forward_hook(lambda module, inputs, output: seen.update(read=inputs[0], output=output))
    apart, by_hand = [], []
    for one, found_2T in list(zip(batch, logits_B2T, strict=True))[:8]:
        alone_2T = double(numbered([one], words))[0]
        apart.append((found_2T[:, : alone_2T.shape[1]] - alone_2T).abs().max() / alone_2T.abs().max())
        wanted_NH = token_by_token(first, seen["read"])
        by_hand.append((seen["output"] - wanted_NH).abs().max() / wanted_NH.abs().max())
    alone, hand = float(torch.stack(apart).max()), float(torch.stack(by_hand).max())  # NaN stays NaN
    if not hand <= BOUND:
        return Check(False, hand, BOUND, "the first FFN is not the chosen expert times its probability")
    told = "" if alone <= BOUND else "an example read alone has other logits than in its batch"
    return Check(not told, alone, BOUND, told)


def token_by_token(ffn: SwitchFfn, x_NH: Tensor) -> Tensor:
    """Return what a switch layer gives, [N, H], from its definition: down_e relu(up_e x) p_e of the likeliest e."""
    rows = []
    for x_H in x_NH:
        p_E = (ffn.router.weight @ x_H).softmax(-1)
        e = int(p_E.argmax())
        rows.append(ffn.down_EHF[e] @ (ffn.up_EFH[e] @ x_H).relu() * p_E[e])
    return torch.stack(rows)
