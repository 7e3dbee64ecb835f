"""Suite ``static``: what compilers make of our GPU kernels, and what a device's peak figures bound. Needs no GPU.

Two kinds of cases, never in one group: ``static-compile``, one per kernel, target and tile; and ``model``, one per
device and number of tokens. Torch and Triton are imported in workers; those of the first kind do not interpret.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Choice, Evidence, Planned, Registry, Trial
from ..kernels.cuda import nvrtc
from ..kernels.targets import TARGETS, device
from ..moe.shapes import ModelShape
from .base import SuiteConfig, plain_case
from .static_kernels import DTYPES, KERNELS, Kernel, calls_of, left_out, tiles_of

COMPILED = {"TRITON_INTERPRET": "0"}
"""The environment of workers whose kernels are compiled: Triton decides when it is imported."""

SECONDS = {"triton": 5.0, "cuda_fused": 15.0}
"""Roughly what it takes to compile one kernel and to read its code."""


@dataclass(frozen=True)
class StaticSuite:
    """The suite; what is compiled, and for which targets, is said by its parameters."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield every kernel with every tile for every target, each once, then the bounds of every device."""
        for model in config.axes["model"]:
            shape = registry.params("model", model).shape()
            for dtype in config.axes["dtype"]:
                if not shape.experts:
                    case = plain_case(config, protocol="once", model=model, dtype=dtype)
                    yield Planned(case, f"model '{model}' has no experts; choose one that has.")
                    continue
                yield from _compiled(config, model, shape, dtype)
                yield from _bounds(config, model, dtype)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the compilation, or the bound."""
        from .static_bound import BoundTrial
        from .static_trial import StaticTrial

        shape = registry.params("model", case.model).shape()
        return BoundTrial(case, shape) if case.evidence == Evidence.MODEL else StaticTrial(case, shape)


def _compiled(config: SuiteConfig, model: Choice, shape: ModelShape, dtype: str) -> Iterator[Planned]:
    seen: set[tuple[str, str, str]] = set()
    params = config.suite_params
    asked = [kernel for kernel in KERNELS if not params.kernel or kernel.name in params.kernel]
    for tokens in config.axes["tokens"]:
        for kernel in (kernel for kernel in asked if calls_of(tokens) in kernel.calls):
            for tile in tiles_of(kernel, shape, tokens, dtype, params.tile):
                for target in params.target:
                    if (kernel.name, tile, target) not in seen:
                        seen.add((kernel.name, tile, target))
                        yield _planned(config, model, dtype, tokens, kernel, tile, target)


def _planned(
    config: SuiteConfig, model: Choice, dtype: str, tokens: int, kernel: Kernel, tile: str, target: str
) -> Planned:
    case = plain_case(
        config,
        protocol="once",
        model=model,
        backend=Choice(kernel.backend, {"kernel": kernel.name, "tile": tile}),
        tokens=tokens,
        dtype=dtype,
        evidence=Evidence.STATIC_COMPILE,
        workload={"target": target},
        environment=COMPILED,
    )
    refusal = _missing(kernel) or _unsupported(kernel, dtype, target)
    if refusal is None and not config.suite_params.tile:
        refusal = left_out(kernel, tile, dtype, TARGETS[target])
    return Planned(case, refusal, seconds=SECONDS[kernel.backend])


def _bounds(config: SuiteConfig, model: Choice, dtype: str) -> Iterator[Planned]:
    for tokens in config.axes["tokens"]:
        for name in config.suite_params.device:
            case = plain_case(
                config,
                protocol="once",
                model=model,
                backend=Choice("roofline", {"device": name}),
                tokens=tokens,
                dtype=dtype,
                evidence=Evidence.MODEL,
            )
            refusal = f"no peak of {dtype} is known of {name}; use axes.dtype=bfloat16."
            yield Planned(case, None if dtype in device(name).flops else refusal, seconds=1.0)


def _missing(kernel: Kernel) -> str | None:
    if kernel.backend == "cuda_fused":
        return nvrtc.missing() or None
    return None if importlib.util.find_spec("triton") else f"triton is not installed; {nvrtc.INSTALL}."


def _unsupported(kernel: Kernel, dtype: str, target: str) -> str | None:
    if dtype not in DTYPES[kernel.backend]:
        known = ", ".join(DTYPES[kernel.backend])
        return f"kernel '{kernel.name}' does not compute in {dtype}; use axes.dtype=[{known}]."
    if kernel.backend == "cuda_fused" and TARGETS[target].platform != "CUDA":
        return f"kernel '{kernel.name}' is CUDA C++, which is not compiled for {target}."
    return None


def create(params: Any) -> StaticSuite:
    """Make suite ``static``; cases carry what of ``params`` they need."""
    return StaticSuite()
