"""Probe ``voids``: how much of the depth tokens use, and what it costs to leave the rest out.

Shape letters: L layers, T tokens, H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.voids import decided, jensen_shannon, matched, uniform
from ..models import substream
from .base import Stage, close, holds, same_bits
from .scene import Scene, perplexity
from .skipping import Skipping, norms, skipping, visible

AGREED = 0.99
"""Of decisions token by token with a cache and all at once: rounding may turn those near their threshold."""

RANDOM: dict[str, Callable[[Tensor, int], Tensor]] = {"matched": matched, "uniform": uniform}
"""Random skippings: as many tokens in every layer as LAC skips there, or as many in all."""


class Voids:
    """LAC in one mode on the passage, random skippings where it skips, and generated tokens."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.case, self.given = Scene(case, registry), case, case.workload
        self.input_sha256, self.mode = self.scene.input_sha256, self.given["mode"]
        self.plain_TH = torch.empty(0)
        self.active: list[Tensor] = []
        self.generated: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}

    @property
    def stages(self) -> Sequence[Stage]:
        """The model as it is, LAC, random skippings, generation; then the model as it was."""
        draws = range(self.given["draws"]) if self.mode == "skip" else ()
        random = [partial(self.random, kind, draw) for kind in RANDOM for draw in draws]
        return [self.whole, self.adaptive, *random, self.generation, self.again]

    def _how(self, forced: Tensor | None = None) -> Skipping:
        return Skipping(self.mode, self.given["alpha"], self.given["kv"], forced)

    def whole(self) -> list[Check]:
        """Judge the model as it is, its changed layers in the last window by the oracle."""
        self.plain_TH = self.scene.finals()
        self.losses["dense"] = self.scene.losses(self.plain_TH)
        return self.scene.call_checks()

    def adaptive(self) -> list[Check]:
        """Run LAC on every window; of the first see that it is what the definition says."""
        finals, checks = [], []
        for ids_T in self.scene.windows():
            with skipping(self.scene.model, self._how()) as how:
                finals.append(self.scene.forward(ids_T))
            self.active.append(torch.stack(how.active))
            if len(finals) == 1:
                checks = self._check(ids_T, how, finals[0])
        if self.mode == "trace":
            checks.append(same_bits(torch.cat(finals), self.plain_TH, "tracing"))
        self.losses[self.mode] = self.scene.losses(torch.cat(finals))
        return checks

    def _check(self, ids_T: Tensor, how: Skipping, final_TH: Tensor) -> list[Check]:
        """Go through the layers by hand, in the plainest way, with the decisions that were made."""
        active_LT, decoder = torch.stack(how.active), self.scene.model.model
        with torch.no_grad(), self.scene.exchanged():
            state_TH = decoder.embed_tokens(ids_T) * getattr(decoder, "embedding_multiplier", 1.0)
            last_TH, changes = state_TH.clone(), []
            for active_T, layer in zip(active_LT, self.scene.layers, strict=True):
                masked = {"attention_mask": visible(active_T, state_TH.dtype)} if how.kv == "missing" else {}
                out_TH = layer(state_TH[None], **{**how.kwargs, **masked})[0]
                changes.append(norms(out_TH) - norms(state_TH))
                last_TH[active_T] = out_TH[active_T]
                state_TH = last_TH.clone() if self.mode == "skip" else out_TH
            expected_TH = decoder.norm(state_TH if self.mode == "trace" else last_TH)
        per_token = torch.stack(changes).T.tolist()
        wrong = sum(decided(of, how.alpha) != active_LT[:, t].tolist() for t, of in enumerate(per_token))
        return [
            close(final_TH, expected_TH, f"layers by hand in mode {self.mode}", 1e-5),
            holds(wrong == 0, f"{wrong} tokens are decided otherwise than the definition says"),
        ]

    def random(self, kind: str, draw: int) -> list[Check]:
        """Skip at random, with LAC's profile over layers or without."""
        finals, counts = [], []
        for window, ids_T in enumerate(self.scene.windows()):
            forced_LT = RANDOM[kind](self.active[window], substream(self.case.seed, kind, draw, window))
            with skipping(self.scene.model, self._how(forced_LT)) as how:
                finals.append(self.scene.forward(ids_T))
            axis = 1 if kind == "matched" else (0, 1)
            counts.append(torch.equal(torch.stack(how.active).sum(axis), self.active[window].sum(axis)))
        self.losses[f"{kind} {draw}"] = self.scene.losses(torch.cat(finals))
        return [holds(all(counts), "random skipping skips another number of tokens")]

    def generation(self) -> list[Check]:
        """Generate greedily after the first halves of windows; the layers of each new token are its own step's."""
        checks = []
        for prompt_T in self.scene.windows()[: self.given["prompts"]]:
            ids_T, found_LT = self._generated(prompt_T[: max(1, self.scene.window // 2)])
            with skipping(self.scene.model, self._how()) as how:
                self.scene.forward(ids_T)
            at_once_LT = torch.stack(how.active)[:, -found_LT.shape[1] :]
            agreed = float((at_once_LT == found_LT).double().mean())
            checks.append(holds(agreed >= AGREED, f"{agreed:.3f} of the decisions are the same without a cache"))
            self.generated.append(found_LT)
        return checks

    def _generated(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens read, and the activity [L, generated] of those that were generated.

        Where keys are missing a cache would have holes: every step then runs the whole text.
        """
        from transformers import DynamicCache

        cached = self.given["kv"] == "project"
        options = {"use_cache": True, "past_key_values": DynamicCache()} if cached else {}
        new_T, found = ids_T, []
        for step in range(self.given["generated"] + 1):
            with skipping(self.scene.model, self._how()) as how:
                final_TH = self.scene.forward(new_T if cached else ids_T, **options)
            if step:
                found.append(torch.stack(how.active)[:, -1])
            if step < self.given["generated"]:
                new_T = self.scene.model.lm_head(final_TH[-1:]).argmax(-1)
                ids_T = torch.cat([ids_T, new_T])
        return ids_T, torch.stack(found, dim=1)

    def again(self) -> list[Check]:
        """Without hooks the model must be what it was, bit for bit."""
        found_TH = self.scene.forward(self.scene.windows()[0])
        return [same_bits(found_TH, self.plain_TH[: self.scene.window], "having skipped layers")]

    def facts(self) -> Facts:
        """Return usage in both phases, how far these lie apart, and quality by mode."""
        usage_L = torch.cat(self.active, dim=1).double().mean(1)
        generated_L = torch.cat(self.generated, dim=1).double().mean(1)
        mode = self.mode
        metrics = [
            Metric("usage", float(usage_L.mean()), "1", n=sum(part.shape[1] for part in self.active)),
            Metric("generated_usage", float(generated_L.mean()), "1", n=sum(p.shape[1] for p in self.generated)),
            Metric("usage_divergence", jensen_shannon(usage_L, generated_L), "bit"),
            *self.scene.quality(self.losses["dense"], "dense_"),
            *(self.scene.quality(self.losses[mode], f"{mode}_") if mode != "trace" else ()),
        ]
        series = [Series("usage_by_layer", tuple(usage_L.tolist()), "1")]
        series.append(Series("generated_usage_by_layer", tuple(generated_L.tolist()), "1"))
        for kind in RANDOM if mode == "skip" else ():
            drawn = [perplexity(losses) for name, losses in self.losses.items() if name.startswith(kind)]
            metrics.append(Metric(f"{kind}_skip_perplexity", statistics.median(drawn), "1", n=len(drawn)))
            series.append(Series(f"{kind}_skip_perplexity_by_draw", tuple(drawn), "1"))
        return Facts(tuple(metrics), tuple(series), (), self.scene.executed())

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()
