"""Which claims of ``docs/routing.md`` are tested for which routing, read off the tests themselves.

A test says the numbers of its claims (R1 to R28) in its docstring. It is about the routings that it names: by their
parameter class, in its own name, or, among the tests of routers, by name in quotes. A test of a family that names none
is about all of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..contracts import Descriptor

CLAIM = re.compile(r"\bR(?:[1-9]|1\d|2[0-8])\b")


def claims_in_tests(tests: Path, members: Sequence[Descriptor]) -> dict[str, list[str]]:
    """Return the numbers of the tested claims by routing, in order; ``tests`` is the folder with the tests."""
    found: dict[str, set[str]] = {member.name: set() for member in members}
    for path in sorted((tests / "moe").rglob("test_*.py")):
        kin = [member for member in members if family(member) == path.stem.removeprefix("test_")]
        quoted = path.parent.name == "routers" or path.stem == "test_routers"
        for text, numbers in _claiming(path.read_text(encoding="utf-8")):
            for member in _named(text, kin or members, quoted) or kin:
                found[member.name] |= numbers
    return {name: sorted(numbers, key=lambda number: int(number[1:])) for name, numbers in found.items()}


def family(descriptor: Descriptor) -> str:
    """Return the name of the module that holds a routing's parameters."""
    return "" if descriptor.params is None else descriptor.params.__module__.rpartition(".")[2]


def _claiming(source: str) -> Iterator[tuple[str, set[str]]]:
    """Yield (text, claims) of every test function, decorators included, whose docstring names a claim."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            numbers = set(CLAIM.findall(ast.get_docstring(node) or ""))
            if numbers:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                yield "\n".join(lines[first - 1 : node.end_lineno]), numbers


def _named(text: str, members: Iterable[Descriptor], quoted: bool) -> list[Descriptor]:
    """Return the routings that the text of a test names."""
    return [member for member in members if re.search(_pattern(member, quoted), text)]


def _pattern(member: Descriptor, quoted: bool) -> str:
    name = re.escape(member.name)
    options = [rf"\bdef test_{name}_"]
    options += [] if member.params is None else [rf"\b{member.params.__name__}\b"]
    options += [rf"\"{name}\""] if quoted else []
    return "|".join(options)
