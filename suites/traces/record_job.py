"""The recording of a trace in a process of its own: ``python -m moebench.suites.traces.record_job JSON``.

JSON is a ``Job``. Progress is told line by line; what goes wrong is the last line printed, with exit status 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from ...contracts import Case, MoebenchError, Registry, plain
from ..models import ModelSource
from ..models.smollm2_jobs import ended, token_ids
from ..text import evaluation_text
from .files import write_trace
from .recording import Recording, record, watching

PROMPT_TOKENS = 32
"""Of the text that is read: as many are the prompt, where none is given."""


@dataclass(frozen=True)
class Job:
    """What to record: the ``case`` as JSON has it, and the file to write.

    ``prompt`` is text to go on from; ``text`` is a file whose tokens are read in the place of generated ones. Without
    either the model goes on from the beginning of the evaluation text.
    """

    case: dict[str, Any]
    plugins: list[str]
    target: str
    tokens: int
    prompt: str | None = None
    text: str | None = None


def run(job: Job) -> None:
    """Record and write the trace."""
    case, registry = Case.from_json(job.case), Registry.load(job.plugins)
    source: ModelSource = registry.get("model", case.model.name).create(case.model.params)
    if not hasattr(source, "language_model"):
        raise MoebenchError(f"model '{case.model}' has no language model around its layers; record another.")
    model, tokenizer = source.language_model()
    prompt_S, text_S = ids_of(job, tokenizer)
    with watching(model, case, registry) as watch:
        made = record(model, watch, prompt_S, job.tokens, text_S, lambda line: print(line, flush=True))
    if text_S is None:
        told = tokenizer.decode(made.ids_S[len(prompt_S) :])
        print(f"generated: {told!r}", flush=True)
    write_trace(job.target, made.columns, facts_of_job(job, case, made), made.hints)


def ids_of(job: Job, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """Return the ids of the prompt, and those that are read after it (None: those that the model generates)."""
    if job.text is not None:
        content = Path(job.text).read_text(encoding="utf-8")
        ids_S: Tensor = tokenizer(content, return_tensors="pt").input_ids[0].long()
        needed = PROMPT_TOKENS + job.tokens
        if len(ids_S) < needed:
            raise MoebenchError(
                f"{job.text} has {len(ids_S)} tokens where {needed} are read; give a longer text or lower --tokens."
            )
        return ids_S[:PROMPT_TOKENS], ids_S[PROMPT_TOKENS:needed]
    if job.prompt is not None:
        prompt_S: Tensor = tokenizer(job.prompt, return_tensors="pt").input_ids[0].long()
        return prompt_S, None
    return token_ids(tokenizer, evaluation_text(), PROMPT_TOKENS), None


def facts_of_job(job: Job, case: Case, made: Recording) -> dict[str, Any]:
    """Return what the trace says of how it was made."""
    named = {axis: getattr(case, axis) for axis in ("model", "structure", "routing", "quantization")}
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    own = {"weights_sha256": case.weights_sha256, "layers": case.layers, "seed": case.seed, "versions": versions}
    facts: dict[str, Any] = plain({**made.facts, **named, **own})
    return facts


def main(arguments: Sequence[str]) -> int:
    """Run the job; what goes wrong is the last line printed."""
    job = Job(**json.loads(arguments[0]))
    return ended(int(job.case["threads"]), lambda: run(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
