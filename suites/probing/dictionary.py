"""Probe ``sae``: a sparse dictionary of one attention's output before W_O, beside PCA and a random dictionary.

Shape letters: T tokens, D width of all heads, H hidden, S entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.dictionary import Dictionary, Recipe, by_principal, by_random, principal, train
from ..models import substream
from ..quality.language_model import forward_from
from .base import Stage, holds, same_bits
from .scene import Scene

CHECKED = 32
"""Tokens on which the loss is computed a second time."""


class AttentionDictionary:
    """Trains on the calibration text and puts what each dictionary tells of the passage back into the model."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.case, self.given = Scene(case, registry), case, case.workload
        self.input_sha256 = self.scene.input_sha256
        layers = len(self.scene.layers)
        self.index = layers // 3 if self.given["layer"] is None else int(self.given["layer"])
        if not 0 <= self.index < layers:
            raise ValueError(f"layer={self.index} must lie between 0 and {layers - 1}.")
        self.seed = substream(case.seed, "dictionary")
        self.nats: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.curve: list[float] = []

    @property
    def stages(self) -> Sequence[Stage]:
        """Read z on both texts, train, and judge the model with z in every form."""
        names = ("zero", "sae", "pca", "random")
        return [self.read, self.train, self.controls, *(partial(self.judge, name) for name in names), self.again]

    def read(self) -> list[Check]:
        """Read z; put back unchanged it must give the model, bit for bit."""
        told = self.scene.windows(self.scene.calibration(self.given["calibration_tokens"]))
        self.training_TD = torch.cat([self._caught(ids_T)[1] for ids_T in told])
        pairs = [self._caught(ids_T) for ids_T in self.scene.windows()]
        self.entering = [entering_TH for entering_TH, _ in pairs]
        self.z = [z_TD for _, z_TD in pairs]
        self.scale = (self.training_TD.shape[1] / float(self.training_TD.square().sum(1).mean())) ** 0.5
        self.plain_TH = self.scene.finals()
        checks = self.scene.call_checks()
        itself_TH = self._with(self.z)
        self.nats["dense"] = self._nats(self.plain_TH)
        return [*checks, same_bits(itself_TH, self.plain_TH, "putting z back")]

    def train(self) -> list[Check]:
        """Train the dictionary on z of unit mean square; its loss must be what a second way says."""
        x_TD = self.training_TD * self.scale
        recipe = Recipe(
            self.given["dictionary"] * x_TD.shape[1],
            self.given["sparsity"],
            self.given["steps"],
            self.given["batch"],
            self.given["lr"],
        )
        self.model, self.curve = train(x_TD, recipe, self.seed)
        with torch.no_grad():
            loss = float(self.model.loss(x_TD[:CHECKED], recipe.sparsity))
        again, norm_S = (
            loss_again(self.model, x_TD[:CHECKED], recipe.sparsity),
            self.model.decoder_SD.detach().norm(dim=1),
        )
        sound = abs(loss - again) <= 1e-4 * abs(again)
        return [
            holds(sound, f"the loss {loss:g} is {again:g} when computed entry by entry"),
            holds(float((norm_S.double() - 1).abs().max()) < 1e-5, "rows of the decoder are not of length 1"),
        ]

    @torch.no_grad()
    def controls(self) -> list[Check]:
        """Tell z by the dictionary, by as many principal components as it has entries at once, and by random atoms."""
        x_TD, seen_TD = self.training_TD * self.scale, torch.cat(self.z) * self.scale
        f_TS = self.model.encode(seen_TD)
        self.l0 = float((f_TS > 0).double().sum(1).mean())
        self.dead = float((~(f_TS > 0).any(0)).double().mean())
        self.components = max(1, min(x_TD.shape[1], round(self.l0)))
        mean_D, direction_KD, variance_D = principal(x_TD, self.components)
        rng = torch.Generator().manual_seed(substream(self.seed, "random atoms"))
        atom_SD = torch.nn.functional.normalize(torch.randn(self.model.decoder_SD.shape, generator=rng).double(), dim=1)
        self.told = {
            "zero": torch.zeros_like(seen_TD).double(),
            "sae": self.model.decode(f_TS).double(),
            "pca": by_principal(seen_TD, mean_D, direction_KD),
            "random": by_random(seen_TD, mean_D, atom_SD, self.components),
        }
        total = float((seen_TD.double() - mean_D).square().sum())
        for name, told_TD in self.told.items():
            self.errors[name] = float((told_TD - seen_TD).square().sum()) / total
        lost = (by_principal(x_TD, mean_D, direction_KD) - x_TD).square().sum(1).mean()
        expected = variance_D[self.components :].sum()
        sound = bool((lost - expected).abs() <= 1e-6 * variance_D.sum())
        return [holds(sound, "PCA loses another variance than that of the components left out")]

    def judge(self, name: str) -> list[Check]:
        """Put one form of z into the model."""
        parts = torch.split((self.told[name] / self.scale).float(), self.scene.window)
        self.nats[name] = self._nats(self._with(parts))
        return []

    def again(self) -> list[Check]:
        """Without hooks the model must be what it was, bit for bit."""
        found_TH = self.scene.forward(self.scene.windows()[0])
        return [same_bits(found_TH, self.plain_TH[: self.scene.window], "having put dictionaries in")]

    def _nats(self, final_TH: Tensor) -> float:
        return float(self.scene.losses(final_TH)[:, 0].mean())

    @torch.no_grad()
    def _caught(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state entering the layer and its z, of one window; layers behind it are not run."""
        caught: dict[str, Tensor] = {}
        layer, decoder = self.scene.layers[self.index], self.scene.model.model
        hooks = [
            layer.register_forward_pre_hook(lambda m, inputs: caught.update(state=inputs[0][0].clone())),
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, inputs: caught.update(z=inputs[0][0].clone())),
        ]
        whole = decoder.layers
        self._begin(ids_T)
        with self.scene.exchanged():  # before layers are cut off, since it reaches for all that are changed
            try:
                decoder.layers = whole[: self.index + 1]
                decoder(ids_T[None], use_cache=False)
            finally:
                decoder.layers = whole
                for hook in hooks:
                    hook.remove()
        return caught["state"], caught["z"]

    def _begin(self, ids_T: Tensor) -> None:
        """Tell the changed layers which window comes."""
        self.scene.calls.clear()
        for block in self.scene.blocks.values():
            block.token_ids_T = ids_T

    def _with(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what the head reads of the passage with z replaced, window by window, [T, H]."""
        finals = []
        for ids_T, entering_TH, z_TD in zip(self.scene.windows(), self.entering, parts, strict=True):
            self._begin(ids_T)
            with self.scene.exchanged(), replaced(self.scene.layers[self.index].self_attn.o_proj, z_TD):
                finals.append(forward_from(self.scene.model, self.index, entering_TH))
        return torch.cat(finals)

    def facts(self) -> Facts:
        """Return the loss recovered, (L_zero - L) / (L_zero - L_dense), sparsity, and unexplained variance.

        Where the model loses nothing without z there is no loss to recover.
        """
        zero, dense = self.nats["zero"], self.nats["dense"]
        gap = zero - dense
        metrics = [
            Metric("l0", self.l0, "1", n=len(self.plain_TH)),
            Metric("density", self.l0 / len(self.model.decoder_SD), "1"),
            Metric("dead_entries", self.dead, "1", n=len(self.model.decoder_SD)),
            Metric("components", float(self.components), "1"),
            Metric("dense_nats", dense, "nat/token"),
            Metric("zero_nats", zero, "nat/token"),
        ]
        for name in ("sae", "pca", "random"):
            metrics.append(Metric(f"{name}_loss_recovered", (zero - self.nats[name]) / gap if gap else None, "1"))
            metrics.append(Metric(f"{name}_unexplained", self.errors[name], "1"))
        reason = f"z of layer {self.index}"
        return Facts(tuple(metrics), (Series("training_loss", tuple(self.curve), "1"),), (), None, {"reason": reason})

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()


@contextlib.contextmanager
def replaced(projection: Any, z_TD: Tensor) -> Iterator[None]:
    """Let an output projection read ``z_TD`` in the place of what it is given, until the block ends."""
    swap: Callable[[Any, Any], tuple[Tensor]] = lambda module, inputs: (z_TD[None].to(inputs[0].dtype),)  # noqa: E731
    hook = projection.register_forward_pre_hook(swap)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def loss_again(model: Dictionary, x_TD: Tensor, sparsity: float) -> float:
    """Return the loss in float64, entry by entry: a check that shares no product with the training."""
    shifted_TD = x_TD.double() - model.decoder_D.double()
    left_TD, size = shifted_TD.clone(), 0.0
    for encoder_D, bias, decoder_D in zip(model.encoder_DS.T, model.encoder_S, model.decoder_SD, strict=True):
        f_T = ((shifted_TD * encoder_D.double()).sum(1) + bias.double()).clamp(min=0)
        left_TD -= f_T[:, None] * decoder_D.double()
        size += float(f_T.sum())
    return float(left_TD.square().sum()) / len(x_TD) + sparsity * size / len(x_TD)
