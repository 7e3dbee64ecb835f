"""The advice as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..printable import printable_line
from .advice import Advice
from .counts import PARTS, scratch_bytes
from .hardware import TIERS, Hardware, Rate
from .placements import Placement
from .sizes import bytes_text, count_text, time_text
from .validate import Compared

NAMES = {
    "experts": "routed experts",
    "shared": "shared experts",
    "attention": "attention",
    "dense": "dense FFNs",
    "embedding": "embedding and head",
    "rest": "norms and routers",
}
TIER_NAMES = {"vram": "VRAM", "link": "link", "ram": "RAM", "disk": "disk", "gpu": "GPU", "cpu": "CPU"}


def advice_text(advice: Advice, top: int, checked: str) -> str:
    """Return the whole page; ``checked`` says how far the model was off where it was measured."""
    lines = [
        *_model(advice),
        "",
        *_bytes(advice),
        "",
        *_machine(advice),
        *_refused(advice),
        "",
        *_ranked(advice, top),
        checked,
    ]
    return "\n".join(map(printable_line, lines))


def checked_text(errors: Sequence[float]) -> str:
    """Return how far the model was off where it was measured on this host."""
    if not errors:
        return "how far this is off was not measured on this host yet: run `moebench advise --validate`"
    low, high = min(errors), max(errors)
    return f"on this host the model was off by {low:+.0%} to {high:+.0%} over {len(errors)} measured cases"


def compared_text(compared: Sequence[Compared]) -> str:
    """Return measured cases beside their predictions, and the largest error."""
    rows = [["model", "backend", "p10", "median", "predicted", "error", ""]]
    for one in compared:
        names = [one.name, one.measured.case.backend.name]
        times = [one.measured.undisturbed, one.measured.seconds, one.predicted]
        rows.append([*names, *map(time_text, times), f"{one.error:+.1%}", " ".join(one.measured.flags)])
    worst = max(abs(one.error) for one in compared)
    return "\n".join([*table(rows, left=2, last_left=True), f"largest error {worst:.1%} (goal: at most 20 %)"])


def _model(advice: Advice) -> Iterator[str]:
    own, model = advice.described, advice.described.model
    first = model.moe_layers[0]
    yield (
        f"{own.name} ({model.kind}): {len(model.layers)} layers, {len(model.moe_layers)} of them with {first.experts} "
        f"experts of which a token uses {first.k}"
    )
    yield f"{count_text(model.total)} weights, {count_text(model.active)} for a token; bytes from {own.origin}"
    yield from (f"note: {note}" for note in own.notes)
    if model.longest is not None and advice.load.context > model.longest:
        yield f"note: the context asked for is longer than the {model.longest} tokens that the model knows"


def _bytes(advice: Advice) -> Iterator[str]:
    model, load = advice.described.model, advice.load
    counts = model.parameters()
    rows = [["part", "weights", *(form.form for form in advice.forms)]]
    for part in PARTS:
        if counts[part]:
            sizes = [bytes_text(form.parts[part]) for form in advice.forms]
            rows.append([NAMES[part], count_text(counts[part]), *sizes])
    rows.append(["all", count_text(model.total), *(bytes_text(form.total) for form in advice.forms)])
    yield from table(rows, left=1)
    sequences = f"{load.batch} sequence{'s' if load.batch > 1 else ''} of {load.context} tokens"
    yield f"KV cache of {sequences}: {bytes_text(load.batch * model.kv_bytes(load.context))} (bfloat16)"
    yield f"scratch: {bytes_text(scratch_bytes(model, load.batch))}"


def _machine(advice: Advice) -> Iterator[str]:
    own = advice.hardware
    yield f"memory: VRAM {bytes_text(own.vram) if own.vram else 'none'}, RAM {bytes_text(own.ram)}"
    yield rates_text(own)


def rates_text(own: Hardware) -> str:
    """Return the rates of a machine in one line, each with where it comes from."""
    named = [name for name in own.rates if own.vram or name not in ("vram", "link", "gpu")]
    return "rates: " + ", ".join(_rate(name, own.rates[name]) for name in named)


def _rate(name: str, rate: Rate) -> str:
    if name in TIERS:
        return f"{TIER_NAMES[name]} {rate.value / 1e9:.4g} GB/s ({rate.source})"
    return f"{TIER_NAMES[name]} {rate.value / 1e12:.4g} Tflop/s ({rate.source})"


def _refused(advice: Advice) -> Iterator[str]:
    if advice.refused:
        yield ""
        yield "does not fit:"
        yield from (f"  {one.form}, {one.name}: {one.sum}" for one in advice.refused)


def _ranked(advice: Advice, top: int) -> Iterator[str]:
    if not advice.ranked:
        yield "nothing fits; give more --vram or --ram, a smaller --context or --batch, or another --form."
        return
    by = "TPOT" if advice.goal == "tpot" else "tokens/s"
    yield f"ranked by {by} (evidence: model; nothing below was measured):"
    head = [
        "",
        "placement",
        "form",
        "batch",
        "VRAM",
        "RAM",
        "disk",
        "experts",
        "hits",
        "TPOT",
        "at best",
        "tokens/s",
        "as in",
    ]
    rows = [head] + [_row(place, one) for place, one in enumerate(advice.ranked[:top], 1)]
    used = [
        place
        for place, name in enumerate(head)
        if name not in ("VRAM", "disk") or any(row[place] != "-" for row in rows[1:])
    ]
    yield from table([[row[place] for place in used] for row in rows], left=3, last_left=True)
    if len(advice.ranked) > top:
        yield f"{len(advice.ranked) - top} more with --top {len(advice.ranked)}"


def _row(place: int, one: Placement) -> list[str]:
    made = one.prediction
    sizes = [bytes_text(size) if size else "-" for size in (one.vram, one.ram, one.disk)]
    hits = f"{one.hit:.0%}" + (f" {one.rule}" if one.rule in ("LRU", "static") else "")
    return [
        str(place),
        one.name,
        one.form,
        str(one.load.batch),
        *sizes,
        f"{one.share:.0%}",
        hits,
        time_text(made.serial),
        time_text(made.overlapped),
        f"{made.tokens_per_s:.3g}",
        one.as_in,
    ]


def table(rows: Sequence[Sequence[str]], left: int, last_left: bool = False) -> Iterator[str]:
    """Yield aligned lines: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < left or (last_left and place == len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
