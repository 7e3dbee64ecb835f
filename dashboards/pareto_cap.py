"""Cost, accuracy and performance beside each other, as MoE-CAP (arXiv 2412.07067) has them."""

from __future__ import annotations

from collections.abc import Sequence

from ..results.pareto import Place, best_of_all, span
from . import units
from .data import Case
from .pareto_data import PLACES, Answer, Shown
from .query import Row
from .tables import NOT_MEASURED, esc
from .template import disclosure, section

CAPTION = (
    "MoE-CAP's three, with the share of this machine that a case really used. S-MBU: the bytes of the experts that "
    "were chosen, of what is always on, of inputs and of outputs, per second, over the bandwidth that a probe reached "
    "from memory; above 1 they came from a cache. S-MFU: the same of the flops. A dash is a probe or a price that "
    "nobody gave. All cases of the table ran on one machine at one price, so their cost is their time."
)

TITLES = ("case", "cost of 1M tokens", "quality", "layer-tokens/s", "S-MBU", "S-MFU", "place")


def cap(answer: Answer, shown: Shown) -> str:
    """Return the section with the figures of one front."""
    head = "".join(f'<th scope="col">{esc(answer.y.title if title == "quality" else title)}</th>' for title in TITLES)
    body = "".join(_row(row, case, shown) for row, case in zip(answer.rows(shown), shown.cases, strict=True))
    content = (
        f"<p>{esc(best_in_all(answer, shown))}</p>"
        '<div class="scroll" role="region" aria-labelledby="cap-caption" tabindex="0"><table id="cap-table">'
        f'<caption id="cap-caption">{esc(shown.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{disclosure('cap', (answer.points.sql, answer.peaks.sql))}"
    )
    return section("cap", "Cost, accuracy, performance", content, CAPTION)


def best_in_all(answer: Answer, shown: Shown) -> str:
    """Return whether any case is as good as the best in everything, as far as the intervals tell."""
    x, y = answer.x, answer.y
    judged = [case for case in shown.cases if shown.placed(case).place != Place.UNJUDGED]
    spans = {
        case.label: (
            span(case.row["x"], case.row["x_lo"], case.row["x_hi"], x.better),
            span(case.row["y"], case.row["y_lo"], case.row["y_hi"], y.better),
        )
        for case in judged
    }
    best = best_of_all(spans)
    if not best:
        return "No case is as good as the best in all three: whoever wants one of them pays with another."
    verb = "is" if len(best) == 1 else "are"
    return f"As far as the intervals tell, as good as the best in all three {verb}: {', '.join(best)}."


def _row(row: Row, case: Case, shown: Shown) -> str:
    rate = case.layer_tokens_per_s
    slow, fast = (
        None if rate is None or not ns else rate * (case.median_ns or 0.0) / ns for ns in case.bounds_ns[::-1]
    )
    cells = [
        _number((row["cost_per_million_tokens"], row["cost_per_million_tokens_lo"], row["cost_per_million_tokens_hi"])),
        _number((row["y"], row["y_lo"], row["y_hi"])),
        _number((rate, slow, fast)),
        _number((row["s_mbu"], row["s_mbu_lo"], row["s_mbu_hi"])),
        _number((row["s_mfu"], row["s_mfu_lo"], row["s_mfu_hi"])),
    ]
    placed = shown.placed(case)
    told = f"<small>{esc(shown.first_names(placed.by) or placed.why)}</small>"
    return (
        f'<tr><th scope="row">{esc(case.label)}</th>{"".join(f"<td class=number>{cell}</td>" for cell in cells)}'
        f"<td>{esc(PLACES[placed.place])}{told if placed.by or placed.why else ''}</td></tr>"
    )


def _number(bounds: Sequence[float | None]) -> str:
    value, lo, hi = bounds
    if value is None:
        return NOT_MEASURED
    missing = "<small>no interval</small>"
    interval = missing if lo is None or hi is None else f"<small>[{units.digits(lo)}, {units.digits(hi)}]</small>"
    return f"{units.digits(value)}{interval}"
