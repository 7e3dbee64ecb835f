"""Where a gate's result goes: the terminal, and the files that were asked for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from ...contracts import MoebenchError
from ...results.gate import GateResult


def deliver(result: GateResult, options: argparse.Namespace) -> None:
    """Write the files that the options name, then print the table; a reader that is gone changes no verdict."""
    from ...dashboards.gate_export import gate_json, github_annotations, junit_xml, markdown
    from ...dashboards.gate_text import gate_table

    for name, render in (
        ("junit", junit_xml),
        ("markdown", markdown),
        ("json", gate_json),
    ):
        target = getattr(options, name)
        if target:
            _write(Path(target), render(result), append=name == "markdown")
    with contextlib.suppress(BrokenPipeError):
        if not options.quiet:
            print(gate_table(result, color=sys.stdout.isatty()))
        if options.github:
            print(github_annotations(result))


def _write(path: Path, text: str, append: bool) -> None:
    """Write a file; Markdown is appended, since a step summary may hold other things already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
    except OSError as error:
        raise MoebenchError(f"{path} cannot be written ({error.strerror}); name another file.") from error
    print(f"wrote {path}", file=sys.stderr)
