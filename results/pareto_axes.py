"""What may stand on the axes of a Pareto front: speed and size along x, quality along y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .pareto import Better


@dataclass(frozen=True)
class Axis:
    """One axis. ``unit`` is that of the values; ``absent`` says why no row may have one, and what to do.

    Sources: ``time`` is ``formula`` of the median time of a call ``{ns}``; ``read`` is a metric with chance in it,
    which like a time is compared within one sitting only; ``counted`` is a metric without chance, whose value is its
    own interval; ``metric`` is one of quality; ``items`` is the mean over the judged items of ``task``.
    """

    name: str
    title: str
    unit: str
    better: Better
    source: Literal["time", "read", "counted", "metric", "items"]
    metric: str = ""
    formula: str = ""
    task: str = ""
    absent: str = ""

    @property
    def together(self) -> bool:
        """Whether values may be compared only where they were taken in one sitting."""
        return self.source in ("time", "read")


NO_TIME = "run a suite of speed, such as `moebench run suite=throughput`"
NO_BYTES = "run a suite of layers, such as `moebench run suite=throughput`"
NO_BITS = "run `moebench run suite=quantization` on the same methods"
NO_QUALITY = "run `moebench run suite=accuracy` on the same methods"
NO_ENERGY = (
    "take --x tpot or --x bytes, because no counter of energy was read where these rows were measured, and none is "
    "guessed"
)

X_AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("tpot", "time per token", "ns", "lower", "time", formula="{ns} / tokens", absent=NO_TIME),
        Axis("latency", "time per call", "ns", "lower", "time", formula="{ns}", absent=NO_TIME),
        Axis(
            "throughput",
            "throughput",
            "layer-tokens/s",
            "higher",
            "time",
            formula="1e9 * tokens * layer_count / {ns}",
            absent=NO_TIME,
        ),
        Axis("bytes", "bytes of the experts as stored", "byte", "lower", "counted", "expert_bytes", absent=NO_BYTES),
        Axis("resident", "bytes that the backend holds", "byte", "lower", "counted", "resident_bytes", absent=NO_BYTES),
        Axis("bits", "stored bits per weight", "bit", "lower", "counted", "bits_per_weight", absent=NO_BITS),
        Axis("disk", "bytes of the experts on disk", "byte", "lower", "counted", "file_bytes", absent=NO_BITS),
        Axis("energy", "energy per call", "J", "lower", "read", "energy", absent=NO_ENERGY),
    )
}
"""Speed and size; times are medians over all calls."""

Y_AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("ppl", "perplexity", "1", "lower", "metric", "perplexity", absent=NO_QUALITY),
        Axis("kl", "KL to dense", "nat/token", "lower", "metric", "kl_to_dense", absent=NO_QUALITY),
        Axis("bpb", "bits per byte", "bit/byte", "lower", "metric", "bits_per_byte", absent=NO_QUALITY),
        Axis("agreement", "top-1 agreement with dense", "1", "higher", "metric", "top1_agreement", absent=NO_QUALITY),
        Axis("error", "output error to dense", "1", "lower", "metric", "output_error", absent=NO_QUALITY),
    )
}
"""Quality as one metric of a method; each task with judged items is one more, see ``item_axis``."""

ITEM_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")
"""Metrics of items whose mean is the metric of the task, and of which more is better."""


def item_axis(task: str, metric: str) -> Axis:
    """Return the axis of a metric's mean over the items of a task: ``accuracy:TASK``, or ``accuracy:TASK:METRIC``."""
    name = f"accuracy:{task}" if metric == ITEM_METRICS[0] else f"accuracy:{task}:{metric}"
    return Axis(name, f"{metric} on {task}", "1", "higher", "items", metric, task=task)
