"""Descriptors of the suites, and those of models and traffic. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..contracts import Descriptor
from . import model_plugins

DENSE_BACKENDS = ("eager", "grouped", "compiled")
"""The backends that run dense weights fast enough to be timed by default."""


@dataclass(frozen=True)
class LayerSuite:
    """Suites of one layer have no parameters of their own; their axes say everything.

    ``AXES`` are the defaults of the axes, ``ENGINE`` those of the engine's settings where a suite needs its own.
    """

    AXES: ClassVar[Mapping[str, Any]] = {
        "structure": ["none"],
        "routing": ["topk"],
        "quantization": ["none"],
        "sparsity": ["none"],
        "backend": list(DENSE_BACKENDS),
        "traffic": ["gaussian"],
        "tokens": [256],
        "dtype": ["float32"],
        "pass": ["forward"],
        "boundary": ["topk"],
        "threads": [1],
        "residency": ["auto"],
    }


@dataclass(frozen=True)
class Throughput(LayerSuite):
    """Many tokens through one layer."""

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "tokens": [64, 256, 1024]}


@dataclass(frozen=True)
class Latency(LayerSuite):
    """Decode (T = 1 to 16, weights cold) and prefill of one layer, with enough calls for a 99th percentile."""

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "tokens": [1, 4, 16, 256],
        "backend": ["eager", "batched", "grouped", "compiled"],
    }
    ENGINE: ClassVar[Mapping[str, Any]] = {"min_calls": 400}


@dataclass(frozen=True)
class Training(LayerSuite):
    """Forward and backward of one layer."""

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "pass": ["forward_backward"],
        "backend": ["eager", "grouped"],
    }


@dataclass(frozen=True)
class Accuracy:
    """Quality on ``tokens`` tokens of the evaluation text, in windows of ``window`` tokens that see each other.

    The first ``prompt`` tokens of each window are given and not judged: a routing that looks ahead within a prompt
    alone can be judged on what follows it.
    """

    tokens: int = 2048
    window: int = 256
    prompt: int = 0

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["smollm2"], "backend": ["eager"]}

    def __post_init__(self) -> None:
        if self.window < 2 or self.tokens < 1 or self.tokens % self.window:
            raise ValueError(f"tokens={self.tokens} must be a positive multiple of window={self.window}, itself >= 2")
        if not 0 <= self.prompt < self.window:
            raise ValueError(f"prompt={self.prompt} must be shorter than window={self.window}, and not negative")


@dataclass(frozen=True)
class BackendKL(Accuracy):
    """Each backend against ``reference`` on ``tokens`` tokens of text, in windows of ``window``, with equal Routings.

    A case fails where the model's predictions diverge by more than rounding in its dtype explains; the layer and the
    expert that are off the most are named.
    """

    tokens: int = 512

    AXES: ClassVar[Mapping[str, Any]] = {**Accuracy.AXES, "backend": list(DENSE_BACKENDS)}


@dataclass(frozen=True)
class LmEval:
    """``tasks`` of lm-eval on a model with some FFNs changed, by its own ``HFLM``: the first ``items`` of each.

    Tasks whose names begin with ``moebench_`` are our own and need no network; any other is lm-eval's, by its name.
    A request may have ``window`` tokens; ``batch`` of them are answered at once, padded, which changes last digits.
    `model.layers=[]` changes no layer: the model as it is.
    """

    tasks: tuple[str, ...] = (
        "moebench_cloze",
        "moebench_grammar",
        "moebench_arithmetic",
        "moebench_copying",
        "moebench_bits_per_byte",
    )
    items: int | None = 300
    window: int = 256
    batch: int = 1

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["smollm2"], "backend": ["eager"]}

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks must be names, each once")
        if self.window < 2 or self.batch < 1 or (self.items is not None and self.items < 1):
            raise ValueError(
                f"items and batch must be at least 1 and window 2, not {self.items}, {self.batch}, {self.window}"
            )

    @property
    def tokens(self) -> int:
        """The most tokens that a changed layer sees at once."""
        return self.window


@dataclass(frozen=True)
class BalanceOptimum:
    """The least balance loss of MoE++ for ``ffn_experts`` FFN experts and the other experts of the routing."""

    ffn_experts: int = 8

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "routing": ["moepp"]}

    def __post_init__(self) -> None:
        if self.ffn_experts < 1:
            raise ValueError(f"ffn_experts={self.ffn_experts} must be at least 1")


@dataclass(frozen=True)
class BalancedTime(LayerSuite):
    """The FFN experts of a layer at the balance of MoE++, beside a layer of FFN experts alone."""

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "routing": ["topk", "moepp"],
        "backend": ["eager"],
        "tokens": [2048],
    }


@dataclass(frozen=True)
class SelfTest(LayerSuite):
    """A few seconds that go through everything: two methods on three backends of the smallest model."""

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "model": ["tiny"],
        "routing": ["topk", "moepp"],
        "backend": ["eager", "grouped", "reference"],
        "tokens": [32],
        "residency": ["warm"],
    }
    ENGINE: ClassVar[Mapping[str, Any]] = {"processes": 1, "seconds": 0.15, "warmup_seconds": 0.2}


@dataclass(frozen=True)
class Target(LayerSuite):
    """A callable of the user's own sources: `moebench gate --target` makes its cases, and no axis has a say."""


@dataclass(frozen=True)
class Roofline:
    """Probes of this host: square products of ``size``, and reads of buffers that the cache levels hold.

    ``levels`` maps a level to the bytes to read; DRAM is read over ``dram_factor`` times the last-level cache. L1 is
    left out: a call's own overhead is longer than reading it. With ``disk_bytes`` above 0, a whole number of blocks of
    8 MiB, a file of that size is read from the cache's folder.
    """

    size: int = 1024
    levels: Mapping[str, int] = field(default_factory=lambda: {"L2": 2**20, "L3": 2**25})
    dram_factor: float = 2.0
    disk_bytes: int = 0

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "dtype": ["float32", "bfloat16"]}

    def __post_init__(self) -> None:
        if self.disk_bytes < 0 or self.disk_bytes % 2**23:
            raise ValueError(f"disk_bytes={self.disk_bytes} must be a multiple of 8388608, such as 268435456, or 0.")


SUITES = [
    Descriptor("suite", "throughput", "many tokens through one layer", "moebench.suites.speed:throughput", Throughput),
    Descriptor("suite", "latency", "decode and prefill of one layer", "moebench.suites.speed:latency", Latency),
    Descriptor("suite", "training", "forward and backward of one layer", "moebench.suites.speed:training", Training),
    Descriptor(
        "suite", "accuracy", "perplexity and distance to the dense model", "moebench.suites.accuracy:create", Accuracy
    ),
    Descriptor(
        "suite",
        "backend_kl",
        "whether a backend says what the reference says",
        "moebench.suites.accuracy:backend_kl",
        BackendKL,
    ),
    Descriptor(
        "suite",
        "lm_eval",
        "tasks of lm-eval, our own among them",
        "moebench.suites.evaluation:create",
        LmEval,
        requires=("lm-eval",),
    ),
    Descriptor(
        "suite",
        "moepp_balance",
        "the least balance loss of MoE++, found numerically",
        "moebench.suites.moepp:balance",
        BalanceOptimum,
    ),
    Descriptor(
        "suite",
        "moepp_time",
        "time of the FFN experts at MoE++'s balance",
        "moebench.suites.moepp:time_share",
        BalancedTime,
    ),
    Descriptor("suite", "roofline", "what this host can do at best", "moebench.suites.roofline:create", Roofline),
    Descriptor(
        "suite",
        "target",
        "a callable of your own, by `moebench gate --target`",
        "moebench.suites.target:create",
        Target,
    ),
    Descriptor("suite", "selftest", "everything once, in seconds", "moebench.suites.speed:selftest", SelfTest),
]

DESCRIPTORS = [*SUITES, *model_plugins.DESCRIPTORS]
