"""The page ``docs/sparsity.md``: every sparsity with what backends run of it, the suites beside them, and all claims.

Everything but the verdicts comes from the descriptors; verdicts are those of ``docs/papers.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..contracts import Descriptor, LayerSpec, Refusal, Registry, SparsitySpec
from ..suites.paper_specs import Paper, load_papers
from .papers_doc import claims_table
from .routing_doc import defaults, notes, words

INTRO = """\
Every built-in sparsity of activations and weights. *Skipped* names what backend `column_skip` leaves unread (it is the
`sparse=skip` execution; all others mask, which saves no time); `experiment=column_skip` times it beside the dense
kernel and beside the fastest dense backend. A level of 0 is the dense model, bit for bit. Parameters are set as
`params.sparsity.<name>.<parameter>=VALUE`. `moebench run suite=sparsity` says of each what it leaves out, layer by
layer, what that would save, what neighbouring tokens leave out together, and what is lost on text;
`experiment=sparsity_of_smollm2` many of them. Experts, tokens and channels are also left out by routings
([routing.md](routing.md): `odp`, `blockffn`, `moex`, `mohd`, `dropped`) and by structures
([plugins.md](plugins.md): `prune`, `slim`).
"""

SUITES = """\
What looks into models or trains small ones of its own (`moebench run suite=NAME`):
"""

CLAIMS = """\
What published systems claim of sparsity, of what models hold, and of robustness, judged here
([papers.md](papers.md) has the settings, the seeds and the numbers):
"""

BESIDE = ("sparsity", "probe", "lemo", "lemo_finetuning", "sparsed", "delta", "colormae", "dit_moe", "robustness")
"""The suites of this axis."""

CONCERNS = re.compile(
    r"(?:axes|params)\.sparsity\b|axes\.routing=odp\b|suite\.claim=(?:blockffn|moex|mohd)-|axes\.structure=.*\bslim\b"
)


def sparsity_page(descriptors: Iterable[Descriptor], papers_page: str) -> str:
    """Return the page of the sparsities among ``descriptors``, with the verdicts that ``papers_page`` shows."""
    known = list(descriptors)
    members = [member for member in known if member.kind == "sparsity" and member.name != "none"]
    lines = ["# Sparsity", "", INTRO]
    lines += ["| sparsity | paper | rule | defaults | decides at | skipped |", "|" + "---|" * 6]
    lines += [_row(member) for member in members]
    lines += [*notes(members), "", "## Suites", "", SUITES, "| suite | what it is |", "|---|---|"]
    lines += [f"| `{one.name}` | {one.summary} |" for one in known if one.kind == "suite" and one.name in BESIDE]
    lines += ["", "## Claims", "", CLAIMS, *claims_table(filter(concerns, load_papers()), papers_page)]
    return "\n".join(lines) + "\n"


def concerns(paper: Paper) -> bool:
    """Return whether a claim is about this axis."""
    return paper.run.suite in BESIDE or any(CONCERNS.search(setting) for setting in paper.run.overrides)


def _row(member: Descriptor) -> str:
    said, spec = words(member), member.params_from({}).spec()
    where = "weights" if spec.masked_weights else ", ".join(spec.sites)
    cells = (f"`{member.name}`", said.paper, member.summary, defaults(member), where, skipped(spec))
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def skipped(sparsity: SparsitySpec) -> str:
    """Return whether backend ``column_skip`` leaves unread what is left out."""
    backend = Registry.load().get("backend", "column_skip").create({})
    layer = LayerSpec(512, 512, ("ffn",), "float32", sparsity=sparsity)
    answer = backend.supports(layer)
    return "no" if isinstance(answer, Refusal) else "yes"
