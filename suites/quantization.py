"""Suite ``quantization``: what a quantization makes of layers, in bytes, in errors and on text. Torch is in workers.

Like a case of ``accuracy`` one of this suite is a method, judged once, on ``eager``; speed meets it on ``method_key``.
A model without text has bytes and errors all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..contracts import MIXED, Case, Planned, Registry, Trial
from .accuracy import AccuracySuite, text_refusal
from .base import SuiteConfig, sparsity_refusal
from .estimate import STARTED

ENCODING = {"gptq": 2e-6, "awq": 3e-6, "hqq": 1e-6, MIXED: 4e-6}
"""About how many seconds a weight takes, by codec; ``OTHER`` for all other codecs."""

OTHER = 2e-7


@dataclass(frozen=True)
class QuantizationSuite(AccuracySuite):
    """The suite; how much text is judged, in windows of what length, is said by its parameters."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield one case per method and dtype; the first that runs has the seconds that the model takes to load."""
        loading = 0.0
        for planned in super().cases(config, registry):
            if planned.refusal is not None:
                yield planned
                continue
            yield replace(planned, seconds=planned.seconds - loading + _encoding_seconds(planned.case, registry))
            loading = STARTED

    def refusal(self, case: Case, registry: Registry) -> str | None:
        """Return None but where attention is to leave out inputs: what cannot be judged on text has bytes and errors
        nevertheless."""
        return sparsity_refusal(case, registry, whole_model=text_refusal(case, registry) is None)

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the layers, to be quantized, and the text to judge them on."""
        from .quality.quantized import QuantizationTrial

        return QuantizationTrial(case, registry)


def _encoding_seconds(case: Case, registry: Registry) -> float:
    params = registry.params("quantization", case.quantization)
    if getattr(params, "as_stored", False):  # nothing is encoded: the bytes are the file's
        return 0.0
    shape = registry.params("structure", case.structure).reshape(registry.params("model", case.model).shape())
    weights = shape.experts * shape.matrices * shape.hidden * shape.width
    return float(len(case.layers) * weights * ENCODING.get(params.scheme().codec, OTHER))


def create(params: object) -> QuantizationSuite:
    """Make the suite; cases carry what of its parameters they need."""
    return QuantizationSuite()
