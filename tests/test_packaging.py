"""The wheel holds the package and nothing else, works when installed elsewhere, and takes other people's packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tests" / "plugin_package"
SELFTEST = ("suite=selftest", "axes.routing=topk", "engine.seconds=0.05", "engine.warmup_seconds=0.05", "--quiet")
NOT_SHIPPED = {"noxfile.py", "setup.py", "conftest.py"}
HELP_SECONDS = 0.5
"""What an acceptance line of the project says of ``moebench --help``."""


def build(source, target):
    """Build the wheel of ``source`` with the tools that are installed and return it opened."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build(checkout, tmp_path_factory.mktemp("wheel"))


class Environment:
    """A virtual environment that sees the packages of this one, behind its own."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "env" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        self.site = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def see_packages(self):
        """Add the folders of this interpreter's packages; what makes an editable install work is not read there."""
        ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (self.site / "outer.pth").write_text("".join(f"{path}\n" for path in ours))

    def install(self, wheel):
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(self, *command):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"MOEBENCH_STORE": str(self.folder / "store"), "MOEBENCH_CACHE": str(self.folder / "cache")}
        return subprocess.run(command, cwd=self.elsewhere, env=env, capture_output=True, text=True, timeout=120)

    def python(self, code):
        done = subprocess.run([str(self.bin / "python"), "-c", code], capture_output=True, text=True, check=True)
        return done.stdout

    def moebench(self, *arguments):
        done = self.run(str(self.bin / "moebench"), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    example = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, example / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    environment.install(build(example / "source", example / "wheel"))
    environment.see_packages()
    return environment


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_every_file_of_every_package_and_nothing_else(wheel):
    packages = {Path(name).parent for name in tracked_files() if Path(name).name == "__init__.py"}
    packages -= {path for path in packages if path.parts[:1] == ("tests",)}
    expected = {
        f"moebench/{name}"
        for name in tracked_files()
        if Path(name).parent in packages
        and Path(name).name not in NOT_SHIPPED
        and (Path(name).parent != Path() or Path(name).suffix == ".py" or name == "py.typed")
    }
    shipped = {name for name in members(wheel) if ".dist-info/" not in name}
    assert shipped == expected


@pytest.mark.parametrize(
    "name",
    [
        "moebench/py.typed",
        "moebench/contracts.py",
        "moebench/suites/conf/config.yaml",
        "moebench/suites/conf/experiment/quick.yaml",
        "moebench/suites/papers/moepp-balance.yaml",
        "moebench/results/migration_1.sql",
        "moebench/dashboards/report.css",
        "moebench/dashboards/report.js",
        "moebench/dashboards/template.html",
        "moebench/moe/routers/topk.py",
        "moebench/suites/models/smollm2.py",
        "moebench/kernels/cpu/__init__.py",
    ],
)
def test_the_wheel_holds(wheel, name):
    assert name in members(wheel)


def test_the_wheel_has_its_license_and_no_scripts_of_the_repository(wheel):
    names = members(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if Path(name).name in NOT_SHIPPED or "tests/" in name or "docs/" in name]


def test_nothing_generic_lands_in_site_packages(installed):
    names = {path.name for path in installed.site.iterdir()} - {"outer.pth", "__pycache__"}
    left = {name for name in names if not name.endswith(".dist-info")}
    assert left == {"moebench", "moebench_example"}


def test_the_installed_package_is_the_one_that_runs(installed):
    found = installed.run(str(installed.bin / "python"), "-c", "import moebench; print(moebench.__file__)").stdout
    assert Path(found.strip()).is_relative_to(installed.site)
    version = (ROOT / "version.py").read_text().split('"')[-2]
    assert installed.moebench("--version").strip() == f"moebench {version}"


def test_it_lists_backends_with_those_of_other_packages(installed):
    lines = [line.split() for line in installed.moebench("list", "backend").splitlines()]
    assert {"eager", "grouped", "example"} <= {words[0] for words in lines if words}


@pytest.fixture(scope="module")
def measured(installed):
    """What a run in another folder leaves in the store, by backend."""
    assert installed.moebench("run", *SELFTEST, "axes.backend=[eager,example]") == ""
    query = "SELECT backend, status, wall_n > 0 AS timed FROM latest"
    return {row.pop("backend"): row for row in json.loads(installed.moebench("sql", query, "--format=json"))}


def test_it_runs_from_another_folder(installed, measured):
    assert measured["eager"] == {"status": "ok", "timed": True}
    assert not list(installed.elsewhere.iterdir())


def test_a_backend_of_another_package_runs_by_its_name(measured):
    assert measured["example"] == {"status": "ok", "timed": True}


def test_help_is_answered_at_once(installed):
    took = []
    for _ in range(5):
        started = time.perf_counter()
        assert "COMMAND" in installed.moebench("--help")
        took.append(time.perf_counter() - started)
    assert min(took) < HELP_SECONDS
