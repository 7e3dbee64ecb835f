"""Everything that people and CI run: `nox -l` lists it."""

from __future__ import annotations

import os
import shutil
import subprocess

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def install(session: nox.Session, extras: str, editable: bool = True) -> None:
    """Install the project with ``extras``, holding torch to the release that constraints.txt names."""
    where = f".[{extras}]" if extras else "."
    session.install(*CONSTRAINTS, *(["-e"] if editable else []), where)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure experiment `quick` on real weights and write the report; further settings may follow `--`."""
    install(session, "models")
    session.run("moebench", "run", "experiment=quick", "--report", *session.posargs, env=ONE_THREAD)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, file by file on two processes of one thread; pytest's arguments may follow `--`."""
    install(session, "dev")
    install_browser(session)
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and types; types on the installed package, as a user's type checker sees it."""
    install(session, "dev", editable=False)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "-p", "moebench")


@nox.session
def docs(session: nox.Session) -> None:
    """Generate the pages of docs/ that are made from descriptors, schema and claims."""
    install(session, "models")
    session.run("python", "docs/generate.py", *session.posargs, env=ONE_THREAD)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill experiment `quick` at random moments and at every fault point; nothing may be lost or doubled."""
    install(session, "dev")
    session.run("python", "tests/chaos.py", *session.posargs, env=ONE_THREAD)


@nox.session
def micro(session: nox.Session) -> None:
    """Time our own kernels one by one into the store (./results, or $MOEBENCH_STORE); options of pytest may follow."""
    install(session, "dev")
    store = os.environ.get("MOEBENCH_STORE", "results")
    files = ("tests/micro", "-o", "python_files=bench_*.py")
    session.run("pytest", *files, "--moebench-store", store, *session.posargs, env=ONE_THREAD)


@nox.session
def gate(session: nox.Session) -> None:
    """Judge the work tree against its merge base with the main branch; options of `moebench gate` may follow `--`."""
    install(session, "models")
    arguments = session.posargs or ["suite=selftest", "--budget", "8m"]
    base = [] if any(word.startswith("--base") for word in arguments) else ["--base", merge_base()]
    session.run("moebench", "gate", *base, *arguments, env=ONE_THREAD)


@nox.session
def gpu_check(session: nox.Session) -> None:
    """Check what only a GPU can show, and write docs/gpu/<device>-<date>.json, to commit; none begins after 15 minutes.

    torch must be the build for this machine's driver: constraints.txt names a release, whose wheel on Linux is the one
    for CUDA. For another driver install torch into the session's environment first and pass --no-install.
    """
    install(session, "gpu")
    session.install("pytest>=8.3")  # the corner cases of the backends' own tests are shared with them
    session.run("python", "tests/gpu_check/check.py", *session.posargs, env=ONE_THREAD)


@nox.session
def gate_selftest(session: nox.Session) -> None:
    """Judge a layer against itself with known injected work, for some 90 minutes; goes on where it was cut off."""
    install(session, "dev")
    folder = os.environ.get("MOEBENCH_SELFTEST", "gate-selftest")
    session.run("python", "tests/gate_selftest/collect.py", "--folder", folder, *session.posargs, env=ONE_THREAD)
    session.run("python", "tests/gate_selftest/report.py", "--folder", folder, env=ONE_THREAD)


def merge_base() -> str:
    """Return the commit from which HEAD left the main branch; the commit before HEAD where it is the main branch."""
    for branch in ("origin/main", "origin/master", "main", "master"):
        found = subprocess.run(["git", "merge-base", "HEAD", branch], capture_output=True, text=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout != head.stdout:
            return found.stdout.strip()
    return "HEAD~1"


def install_browser(session: nox.Session) -> None:
    """Install Debian's chromium where it is absent and may be installed; the browser tests skip without it."""
    if shutil.which("chromium") or not shutil.which("apt-get") or os.geteuid() != 0:
        return
    session.run("apt-get", "update", "-qq", external=True, success_codes=[0, 100])
    session.run("apt-get", "install", "-y", "-qq", "chromium", external=True, success_codes=[0, 100])
