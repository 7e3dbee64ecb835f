"""What this harness makes of a machine: seconds of calls, and the shares of the tiers' rates that it reaches.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from .counts import Model


@dataclass(frozen=True)
class Program:
    """Seconds of an MoE layer, of an expert used, of an expert brought, and of all else of a decoder layer.

    ``ram`` and ``disk`` are shares of the rates of suite ``roofline``: what products reach, and what the store does.
    """

    layer: float
    expert: float
    brought: float
    decoder: float
    ram: float = 1.0
    disk: float = 1.0

    def seconds(self, model: Model, used: float, brought: float) -> float:
        """Return the seconds of calls in a step that uses so many experts and brings so many of them."""
        return self.calls(len(model.moe_layers), sum(bool(layer.attention) for layer in model.layers), used, brought)

    def calls(self, layers: int, decoders: int, used: float, brought: float) -> float:
        """Return the seconds of calls of so many MoE layers, decoder layers, experts used and experts brought."""
        return layers * self.layer + decoders * self.decoder + used * self.expert + brought * self.brought


@dataclass(frozen=True)
class Run:
    """Seconds of a step, its layers and experts, and the bytes read from RAM and, of experts brought, from disk."""

    seconds: float
    layers: int
    decoders: int
    used: float
    brought: float
    ram_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Runs:
    """What a Program is fitted to, each with all experts at hand and with few.

    ``few`` and ``many`` are too small for bytes to count and differ in the experts used; in ``wide`` bytes count;
    ``decoding`` is a language model that is small, too.
    """

    few: Run
    many: Run
    many_offload: Run
    wide: Run
    wide_offload: Run
    decoding: Run


def fit(runs: Runs, ram: float, disk: float) -> Program:
    """Return the Program of these runs on a machine of these rates; no part is below 0.

    Runs with and without offloading are measured in turns, so what bringing costs is taken from their difference.
    """
    expert = max(0.0, (runs.many.seconds - runs.few.seconds) / (runs.many.used - runs.few.used))
    layer = max(0.0, (runs.few.seconds - runs.few.used * expert) / runs.few.layers)
    more = runs.many_offload.seconds - runs.many.seconds - runs.many_offload.disk_bytes / disk
    own = Program(layer, expert, max(0.0, more / runs.many_offload.brought), 0.0)
    reading = runs.wide.seconds - _calls(own, runs.wide)
    bringing = runs.wide_offload.seconds - runs.wide.seconds - runs.wide_offload.brought * own.brought
    ram_share = _share(runs.wide.ram_bytes, reading, ram)
    decoding = runs.decoding.seconds - _calls(own, runs.decoding) - runs.decoding.ram_bytes / (ram_share * ram)
    decoder = max(0.0, decoding / runs.decoding.decoders)
    return Program(layer, expert, own.brought, decoder, ram_share, _share(runs.wide_offload.disk_bytes, bringing, disk))


def _calls(own: Program, run: Run) -> float:
    return own.calls(run.layers, run.decoders, run.used, run.brought)


def _share(size: float, seconds: float, rate: float) -> float:
    """Return the share of a rate that is reached; all of it where nothing is left to see it by."""
    return size / seconds / rate if seconds > 0 else 1.0


NAMES = (
    "advise_layer_s",
    "advise_expert_s",
    "advise_brought_s",
    "advise_decoder_s",
    "advise_ram_share",
    "advise_disk_share",
)
"""What a Program's parts are called in a store."""


def as_metrics(own: Program) -> Mapping[str, float]:
    """Return the parts by the names that they have in a store."""
    return dict(zip(NAMES, astuple(own), strict=True))
