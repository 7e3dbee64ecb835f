"""Where a model's weights can lie on a machine: what fits, with its prediction, and what does not, with the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .asked import Asked
from .caching import lru_hit_rate, static_hit_rate, touch_probabilities
from .predict import Load, Prediction, Split, predict
from .sizes import bytes_text

LARGEST_BATCH = 256

IN_RAM, FROM_DISK = "everything in RAM", "cache in RAM, fetched from disk"
"""Names of what this harness runs itself."""


@dataclass(frozen=True)
class Placement:
    """One way to run it. Bytes by tier; ``share`` of the experts lies in the fast tier, ``hit`` of requests find theirs
    there, by ``rule``; ``as_in`` names who does it so."""

    name: str
    as_in: str
    form: str
    load: Load
    vram: float
    ram: float
    disk: float
    share: float
    hit: float
    rule: str
    prediction: Prediction


@dataclass(frozen=True)
class NoRoom:
    """A way that does not fit, and the sum that says so."""

    name: str
    form: str
    sum: str


Maker = Callable[[Asked], Placement | NoRoom | None]


def _placed(
    asked: Asked, name: str, as_in: str, split: Split, bytes_of: tuple[float, float, float], share: float, rule: str
) -> Placement:
    made = predict(asked.model, asked.weights, asked.hardware, asked.load, split)
    return Placement(name, as_in, asked.weights.form, asked.load, *bytes_of, share, split.hit, rule, made)


def _too_much(asked: Asked, name: str, total: float, limit: float, parts: str, where: str) -> NoRoom:
    return NoRoom(name, asked.weights.form, f"{parts} = {bytes_text(total)} > {bytes_text(limit)} {where}")


def everything_in_vram(asked: Asked) -> Placement | NoRoom | None:
    """All weights on the GPU."""
    if not asked.hardware.vram:
        return None
    name, need = "everything in VRAM", float(asked.around + asked.experts)
    if need > asked.hardware.vram:
        parts = f"{bytes_text(asked.experts)} of experts + {asked.around_text()}"
        return _too_much(asked, name, need, asked.hardware.vram, parts, "VRAM")
    return _placed(asked, name, "any backend on a GPU", Split("vram", "vram"), (need, 0, 0), 1.0, "")


def _room_in_vram(asked: Asked, name: str, staged: float) -> float | NoRoom | None:
    """Return bytes for experts beside the rest; None where there is no GPU, or where all fit anyway."""
    limit = asked.hardware.vram
    if not limit or asked.around + asked.experts <= limit:
        return None
    room = limit - asked.around - staged
    if room < 0:
        more = f" + {bytes_text(staged)} on their way" if staged else ""
        return _too_much(asked, name, asked.around + staged, limit, asked.around_text() + more, "VRAM")
    return room


def _enough_ram(asked: Asked, name: str, need: float) -> NoRoom | None:
    if need <= asked.hardware.ram:
        return None
    return NoRoom(name, asked.weights.form, f"{bytes_text(need)} of experts > {bytes_text(asked.hardware.ram)} RAM")


def fetched_over_link(asked: Asked) -> Placement | NoRoom | None:
    """A cache of experts on the GPU, all experts in RAM, the missing ones copied."""
    name = "cache in VRAM, fetched from RAM"
    room = _room_in_vram(asked, name, asked.staged)
    if room is None or isinstance(room, NoRoom):
        return room
    share = min(1.0, room / asked.experts)
    refusal = _enough_ram(asked, name, asked.experts)
    if refusal:
        return refusal
    hit, rule = _cached(asked, share)
    used = (asked.around + asked.staged + share * asked.experts, float(asked.experts), 0.0)
    return _placed(
        asked, name, "MoE-Infinity, Mixtral-offloading", Split("vram", "vram", hit, "link"), used, share, rule
    )


def computed_in_ram(asked: Asked) -> Placement | NoRoom | None:
    """The most popular experts on the GPU, the others computed by the cores where they lie."""
    name = "static set in VRAM, computed in RAM"
    room = _room_in_vram(asked, name, 0.0)
    if room is None or isinstance(room, NoRoom):
        return room
    share = min(1.0, room / asked.experts)
    refusal = _enough_ram(asked, name, (1 - share) * asked.experts)
    if refusal:
        return refusal
    used = (asked.around + share * asked.experts, (1 - share) * asked.experts, 0.0)
    split = Split("vram", "vram", _static(asked, share), "ram")
    return _placed(asked, name, "Fiddler, KTransformers", split, used, share, "static")


def layers_in_ram(asked: Asked) -> Placement | NoRoom | None:
    """The experts of the first N layers in RAM, computed by the cores: as few layers as possible."""
    name = "experts of whole layers in RAM"
    room = _room_in_vram(asked, name, 0.0)
    if room is None or isinstance(room, NoRoom):
        return room
    layers = asked.model.moe_layers
    kept = min(len(layers), int(room // (asked.experts / len(layers))))
    share = kept / len(layers)
    refusal = _enough_ram(asked, name, (1 - share) * asked.experts)
    if refusal:
        return refusal
    used = (asked.around + share * asked.experts, (1 - share) * asked.experts, 0.0)
    name = f"cpu_moe:{len(layers) - kept}"
    split = Split("vram", "vram", share, "ram")
    return _placed(asked, name, f"llama.cpp --n-cpu-moe {len(layers) - kept}", split, used, share, "layers")


def everything_in_ram(asked: Asked) -> Placement | NoRoom | None:
    """All weights in RAM, computed by the cores."""
    name, need = IN_RAM, float(asked.around + asked.experts)
    if need > asked.hardware.ram:
        parts = f"{bytes_text(asked.experts)} of experts + {asked.around_text()}"
        return _too_much(asked, name, need, asked.hardware.ram, parts, "RAM")
    return _placed(asked, name, "moebench: any backend on a CPU", Split("ram", "ram", ours=True), (0, need, 0), 1.0, "")


def fetched_from_disk(asked: Asked) -> Placement | NoRoom | None:
    """A cache of experts in RAM, all experts on the disk, everything computed by the cores."""
    name, limit = FROM_DISK, asked.hardware.ram
    if asked.around + asked.experts <= limit:
        return None
    need = asked.around + asked.staged
    if need > limit:
        parts = f"{asked.around_text()} + {bytes_text(asked.staged)} on their way"
        return _too_much(asked, name, need, limit, parts, "RAM")
    share = (limit - need) / asked.experts
    hit, rule = _cached(asked, share)
    used = (0.0, need + share * asked.experts, float(asked.experts))
    return _placed(
        asked, name, "moebench: backend offload", Split("ram", "ram", hit, "disk", ours=True), used, share, rule
    )


def disk_behind_both(asked: Asked) -> Placement | NoRoom | None:
    """All but the experts on the GPU, a cache of experts in RAM where the cores compute them, all experts on disk."""
    name, limit = "rest in VRAM, cache in RAM, fetched from disk", asked.hardware.ram
    room = _room_in_vram(asked, name, 0.0)
    if room is None or asked.experts + asked.staged <= limit:
        return None
    if isinstance(room, NoRoom):
        return room
    if asked.staged > limit:
        return _too_much(asked, name, asked.staged, limit, "experts on their way", "RAM")
    share = (limit - asked.staged) / asked.experts
    hit, rule = _cached(asked, share)
    used = (float(asked.around), asked.staged + share * asked.experts, float(asked.experts))
    return _placed(asked, name, "llama.cpp --cpu-moe with mmap", Split("vram", "ram", hit, "disk"), used, share, rule)


MAKERS: Sequence[Maker] = (
    everything_in_vram,
    fetched_over_link,
    computed_in_ram,
    layers_in_ram,
    everything_in_ram,
    fetched_from_disk,
    disk_behind_both,
)


def _static(asked: Asked, share: float) -> float:
    layer = asked.model.moe_layers[0]
    return static_hit_rate(touch_probabilities(layer.experts, layer.k, asked.load.skew, asked.load.batch), share)


def _cached(asked: Asked, share: float) -> tuple[float, str]:
    """Return the better hit rate of an LRU of all layers and of a static set, and which of them it is."""
    layers = asked.model.moe_layers
    touched = touch_probabilities(layers[0].experts, layers[0].k, asked.load.skew, asked.load.batch)
    lru = lru_hit_rate(touched, len(layers), share * sum(layer.experts for layer in layers))
    static = static_hit_rate(touched, share)
    return (lru, "LRU") if lru > static else (static, "static")


def placements(asked: Asked, search_batch: bool = False) -> Iterator[Placement | NoRoom]:
    """Yield every way, fitting or not; with ``search_batch`` at the batch with the most tokens a second that fits."""
    for maker in MAKERS:
        found = _best_batch(asked, maker) if search_batch else maker(asked)
        if found is not None:
            yield found


def _best_batch(asked: Asked, maker: Maker) -> Placement | NoRoom | None:
    """Return the placement with the most tokens a second over batches that double; the first answer where none fits."""
    first, batch = maker(asked), asked.load.batch
    best: Placement | None = None
    while batch <= LARGEST_BATCH:
        found = maker(replace(asked, load=replace(asked.load, batch=batch)))
        if isinstance(found, Placement) and (best is None or _faster(found, best)):
            best = found
        batch *= 2
    return best or first


def _faster(one: Placement, other: Placement) -> bool:
    return one.prediction.tokens_per_s > other.prediction.tokens_per_s
