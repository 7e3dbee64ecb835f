"""The page ``docs/quantization.md``: every quantization with its bytes, what it looks at, how it runs, and its claims.

All but the verdicts comes from the descriptors and from one matrix that is really encoded; verdicts are those of
``docs/papers.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..backends.packing import unpackable
from ..contracts import MIXED, Descriptor, LayerSpec
from ..suites.paper_specs import Paper, load_papers
from .papers_doc import claims_table
from .routing_doc import defaults, notes, words

SIZE = 512
"""Rows and columns of the matrix whose bytes are counted."""

INTRO = f"""\
Every built-in quantization. Bits per weight are 8 x bytes / weights of a {SIZE} x {SIZE} matrix at the defaults, with
scales, offsets and padding, as it lies in memory and on disk. *Calibrated* ones look at what each expert of a layer
reads, as its own router says: ask for enough `calibration.tokens`, since an expert sees k / E of them, and what was
fitted to a hundred tokens does worse on others than rounding to nearest. `packed` marks codes that torch's CPU kernels
multiply; all others are dequantized when loaded, which says what quality is lost and nothing of speed. Parameters are
set as `params.quantization.<name>.<parameter>=VALUE`. `moebench run suite=quantization` says of each what it takes in
memory and in a file, what it errs, and what that costs on text; `experiment=quantization_of_tinymoe` many of them.
"""

CLAIMS = """\
What published systems claim of quantization, of compressed experts and of choices pruned beside them, judged here
([papers.md](papers.md) has the settings, the seeds and the numbers):
"""

CONCERNS = re.compile(
    r"(?:axes|params)\.quantization\b|axes\.structure=.*\b(?:slim|merge|taylor)\b|axes\.routing=odp\b"
)


def quantization_page(descriptors: Iterable[Descriptor], papers_page: str) -> str:
    """Return the page of the quantizations among ``descriptors``, with the verdicts that ``papers_page`` shows."""
    members = [member for member in descriptors if member.kind == "quantization" and member.name != "none"]
    lines = ["# Quantization", "", INTRO]
    lines += ["| quantization | paper | rule | defaults | bits per weight | calibrated | runs |", "|" + "---|" * 7]
    lines += [_row(member) for member in members]
    lines += [*notes(members), "", "## Claims", "", CLAIMS]
    lines += list(claims_table(filter(concerns, load_papers()), papers_page))
    return "\n".join(lines) + "\n"


def _row(member: Descriptor) -> str:
    said, params = words(member), member.params_from({})
    calibrated = "yes" if getattr(params, "calibrated", False) else "no"
    cells = (f"`{member.name}`", said.paper, member.summary, defaults(member), bits_per_weight(params), calibrated)
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in (*cells, runs(params))) + " |"


def bits_per_weight(params: Any) -> str:
    """Return the bits that a weight takes, from an encoded matrix; of a mixture, its budget; of a file, what it has."""
    import torch

    from ..moe.bits.calibration import channel_stats
    from ..moe.quantization import encoder

    if getattr(params, "as_stored", False):
        return "the file's own"
    if params.scheme().codec == MIXED:
        return f"at most {params.budget:g}"
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    stored = encoder(params)(weight, channel_stats(x, torch.ones(SIZE)))
    return f"{8 * stored.nbytes / weight.numel():.4g}"


def runs(params: Any) -> str:
    """Return how a layer of such experts is executed: packed, packed where its experts allow it, or dequantized."""
    if getattr(params, "as_stored", False):
        return "dequantized"
    scheme = params.scheme()
    layer = LayerSpec(SIZE, SIZE, ("ffn",), "bfloat16", schemes=(scheme,))
    if unpackable(layer):
        return "dequantized"
    return "`packed` where every expert is int8 or int4" if scheme.codec == MIXED else "`packed`"


def concerns(paper: Paper) -> bool:
    """Return whether a claim is about quantization, compression or pruned choices."""
    return paper.run.suite == "distillation" or any(CONCERNS.search(setting) for setting in paper.run.overrides)
