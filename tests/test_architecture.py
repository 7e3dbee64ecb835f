"""Who may import whom, what the parent may import, and that pyproject names every package."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "moe", "backends", "results", "dashboards", "suites", "bench")
MAY_IMPORT = {
    "kernels": set(),
    "moe": set(),
    "backends": {"moe", "kernels"},
    "results": set(),
    "dashboards": {"results"},
    "suites": {"backends", "moe", "kernels"},
    "bench": {"kernels", "moe", "backends", "results", "dashboards", "suites"},
}


def source_files(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if "runs" not in path.relative_to(ROOT).parts]


def imported_modules(path):
    """Yield the absolute names of the moebench modules that a file imports, at any depth of its code."""
    package = ("moebench", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("moebench"))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name.startswith("moebench"):
                yield name
                yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows(folder):
    wrong = []
    for path in source_files(folder):
        for name in imported_modules(path):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else ""
            if target in FOLDERS and target != folder and target not in MAY_IMPORT[folder]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_test_sees_imports():
    names = set(imported_modules(ROOT / "bench" / "run.py"))
    assert "moebench.contracts.Registry" in names
    assert "moebench.dashboards.text" in names


def test_contracts_use_the_standard_library_only():
    imported = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "contracts.py").read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)


def test_no_import_cycles_at_module_level():
    graph = {}
    for folder in FOLDERS:
        for path in source_files(folder):
            module = ".".join(("moebench", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
            graph[module] = set(top_level_imports(path))
    state = {}

    def visit(module, trail):
        if state.get(module) == "done" or module not in graph:
            return
        assert module not in trail, " -> ".join([*trail, module])
        for target in graph[module]:
            visit(target, [*trail, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


def top_level_imports(path):
    package = ("moebench", *path.relative_to(ROOT).with_suffix("").parts)
    package = package[:-1] if package[-1] == "__init__" else package
    level_base = 0 if path.name == "__init__.py" else 1
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + (1 - level_base)]
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def test_pyproject_names_every_package():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("moebench", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in source_files(folder)
        if path.name == "__init__.py"
    }
    assert declared == found | {"moebench"}


PARENT_MODULES = ("cli", "run", "commands", "config", "plan", "runner", "sampling", "ring", "host", "rundir")


def test_the_parent_imports_no_torch():
    code = "import sys, importlib\n" + "".join(
        f"importlib.import_module('moebench.bench.{name}')\n" for name in PARENT_MODULES
    )
    code += "from moebench.contracts import Registry\nRegistry.load()\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_planning_imports_no_torch():
    code = (
        "import sys\nfrom moebench.bench.cli import main\n"
        "main(['run', 'suite=selftest', '--plan'])\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "False"


def test_help_loads_little():
    code = (
        "import sys\nfrom moebench.bench import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'hydra', 'duckdb', 'rich', 'plotly', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"
