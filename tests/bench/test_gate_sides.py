"""The sides of a gate: their trees, their interpreters and what they import."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest

from moebench.bench.gate.sides import cleanup, environment_side, revision_side, wheel_side
from moebench.contracts import MoebenchError

OURS = {
    "__init__.py": "VALUE = 1\n",
    "contracts.py": "",
    "bench/__init__.py": "",
    "bench/worker.py": "",
    "pyproject.toml": '[project]\nname = "moebench"\n',
}


def git(repo, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, "-C", str(repo), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(repo, files):
    for name, text in files.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)


def commit(repo, files):
    write(repo, files)
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "-m", "change")
    return git(repo, "rev-parse", "HEAD")


def repository(tmp_path, *commits):
    """Return a repository with these commits and their shas."""
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "--quiet", "--initial-branch=main")
    return repo, [commit(repo, files) for files in commits]


def imported(side, code):
    """Return what Python code prints on a side, started as the workers are."""
    environment = {**os.environ, **side.environment}
    command = [side.python, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=side.cwd)
    return done.stdout.strip()


def state(repo):
    """Return everything of a repository that a user would miss."""
    index = (repo / ".git" / "index").read_bytes()
    return index, git(repo, "for-each-ref"), git(repo, "symbolic-ref", "HEAD"), git(repo, "status", "--porcelain")


def test_the_tree_wins_over_an_installed_moebench(tmp_path):
    repo, shas = repository(tmp_path, OURS, {"__init__.py": "VALUE = 2\n"})
    sides = [revision_side(repo, rev, tmp_path / "cache") for rev in ("HEAD~1", "main")]
    assert [side.name for side in sides] == [f"HEAD~1 ({shas[0][:7]})", f"main ({shas[1][:7]})"]
    assert [side.version for side in sides] == shas
    code = "import moebench, moebench.bench.worker as w; print(moebench.VALUE, moebench.__file__, w.__file__)"
    for value, side in enumerate(sides, 1):
        tree = tmp_path / "cache" / "gate" / shas[value - 1] / "moebench"
        assert imported(side, code) == f"{value} {tree}/__init__.py {tree}/bench/worker.py"
        assert side.python == sys.executable


def test_the_real_moebench_gives_its_worker(tmp_path):
    from moebench import __file__ as package

    root = os.path.dirname(package)
    if not os.path.exists(os.path.join(root, ".git")):
        pytest.skip("moebench is not a checkout here.")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", root, str(clone)], check=True)
    side = revision_side(clone, "HEAD", tmp_path / "cache")
    assert imported(side, "import moebench.bench.worker as w; print(w.__file__)").startswith(str(side.cwd))


def test_nothing_of_the_user_is_touched(tmp_path):
    repo, _ = repository(tmp_path, OURS, {"a.txt": "1"})
    write(repo, {"a.txt": "2", "new.txt": "3", ".git/hooks/post-checkout": "#!/bin/sh\ntouch $PWD/hooked\n"})
    (repo / ".git" / "hooks" / "post-checkout").chmod(0o755)
    git(repo, "status")
    before = state(repo)
    for rev in ("HEAD~1", "."):
        side = revision_side(repo, rev, tmp_path / "cache")
        assert not (side.cwd / "moebench" / "hooked").exists()
    assert state(repo) == before


def test_a_git_environment_of_a_hook_does_not_mislead(tmp_path, monkeypatch):
    repo, shas = repository(tmp_path, OURS)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert revision_side(repo, "HEAD", tmp_path / "cache").version == shas[0]


def test_a_tree_is_used_again_while_it_is_clean(tmp_path):
    repo, _ = repository(tmp_path, OURS)
    tree = revision_side(repo, "HEAD", tmp_path / "cache").cwd / "moebench"
    write(tree, {"__pycache__/a.pyc": "x", "bench/__pycache__/b.pyc": "x"})
    stamp = (tree / "contracts.py").stat().st_ino
    revision_side(repo, "HEAD", tmp_path / "cache")
    assert (tree / "contracts.py").stat().st_ino == stamp
    write(tree, {"contracts.py": "edited"})
    revision_side(repo, "HEAD", tmp_path / "cache")
    assert (tree / "contracts.py").read_text() == ""
    write(tree, {"stray.py": ""})
    revision_side(repo, "HEAD", tmp_path / "cache")
    assert not (tree / "stray.py").exists()


def test_stale_worktrees_are_no_obstacle(tmp_path):
    repo, _ = repository(tmp_path, OURS)
    tree = revision_side(repo, "HEAD", tmp_path / "cache").cwd
    for path in sorted(tree.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    side = revision_side(repo, "HEAD", tmp_path / "cache")
    assert (side.cwd / "moebench" / "contracts.py").exists()
    assert len(git(repo, "worktree", "list").splitlines()) == 2


def test_cleanup_leaves_what_another_process_uses(tmp_path):
    repo, _ = repository(tmp_path, OURS)
    cache = tmp_path / "cache"
    side = revision_side(repo, "HEAD", cache)
    code = (
        "import sys; from pathlib import Path; from moebench.bench.gate.sides import revision_side\n"
        f"revision_side(Path({str(repo)!r}), 'HEAD', Path({str(cache)!r})); print(); sys.stdout.flush(); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    cleanup(cache)
    assert (side.cwd / "moebench").is_dir()
    other.communicate("\n")
    cleanup(cache)
    assert not side.cwd.exists()
    assert len(git(repo, "worktree", "list").splitlines()) == 1


def test_cleanup_leaves_the_users_own_worktrees(tmp_path):
    """One whose folder is absent may lie on a disk that is only not mounted."""
    repo, _ = repository(tmp_path, OURS)
    git(repo, "worktree", "add", "--quiet", "--detach", str(tmp_path / "theirs"))
    (tmp_path / "theirs").rename(tmp_path / "unmounted")
    revision_side(repo, "HEAD", tmp_path / "cache")
    cleanup(tmp_path / "cache")
    (tmp_path / "unmounted").rename(tmp_path / "theirs")
    assert len(git(repo, "worktree", "list").splitlines()) == 2
    assert git(tmp_path / "theirs", "status", "--porcelain") == ""


def test_a_name_that_is_no_utf8(tmp_path):
    repo, _ = repository(tmp_path, OURS)
    (repo / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    side = revision_side(repo, ".", tmp_path / "cache")
    assert (side.cwd / "moebench" / os.fsdecode(b"caf\xe9.txt")).read_text() == "x"


def test_two_gates_at_once_make_one_tree(tmp_path):
    repo, _ = repository(tmp_path, OURS)
    code = (
        "from pathlib import Path; from moebench.bench.gate.sides import revision_side\n"
        f"print(revision_side(Path({str(repo)!r}), 'HEAD', Path({str(tmp_path / 'cache')!r})).cwd)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({one.communicate()[0] for one in both}) == 1
    assert [one.returncode for one in both] == [0, 0]
    assert len(git(repo, "worktree", "list").splitlines()) == 2


def test_the_work_tree_as_it_is_now(tmp_path):
    repo, shas = repository(tmp_path, {**OURS, "gone.py": "", ".gitignore": "*.bin\n"})
    clean = revision_side(repo, ".", tmp_path / "cache")
    assert (clean.name, clean.version) == (f"work tree ({shas[0][:7]})", shas[0])
    write(repo, {"__init__.py": "VALUE = 3\n", "new/ü ü.py": "", "big.bin": "", "results/runs/r/run.json": "{}"})
    (repo / "gone.py").unlink()
    (repo / "link").symlink_to("contracts.py")
    side = revision_side(repo, ".", tmp_path / "cache")
    tree = side.cwd / "moebench"
    assert side.name == f"work tree ({shas[0][:7]} + changes)"
    assert side.version.startswith(f"{shas[0]}-")
    assert imported(side, "import moebench; print(moebench.VALUE)") == "3"
    assert (tree / "new" / "ü ü.py").exists()
    assert (tree / "link").is_symlink()
    assert not any((tree / name).exists() for name in ("gone.py", "big.bin", "results", ".git"))
    write(tree, {"contracts.py": "edited in the copy"})
    assert revision_side(repo, ".", tmp_path / "cache") == side
    assert (tree / "contracts.py").read_text() == ""
    write(repo, {"contracts.py": "edited"})
    assert revision_side(repo, ".", tmp_path / "cache").version != side.version


def test_another_repository_keeps_our_moebench(tmp_path):
    repo, _ = repository(tmp_path, {"mine.py": "A = 1\n"}, {"src/mine.py": "A = 2\n"})
    (repo / "sub").mkdir()
    old, new = (revision_side(repo / "sub", rev, tmp_path / "cache") for rev in ("HEAD~1", "HEAD"))
    here = subprocess.run([sys.executable, "-c", "import moebench; print(moebench.__file__)"], **PIPED).stdout.strip()
    code = "import mine, moebench; print(mine.A, moebench.__file__)"
    assert [imported(side, code) for side in (old, new)] == [f"1 {here}", f"2 {here}"]
    assert (new.cwd / "src").is_dir()


PIPED = {"capture_output": True, "text": True, "check": True, "cwd": "/"}


def tiny_wheel(folder, name="tiny", version="1.0", requires=""):
    """Write a wheel of one module and return its path."""
    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return file


def test_other_dependencies_get_an_environment_of_their_own(tmp_path, monkeypatch):
    from moebench.bench.gate import environments

    monkeypatch.setattr(environments, "_own_requirements", list)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tiny_wheel(tmp_path)
    repo, _ = repository(
        tmp_path,
        {"mine.py": "", "pyproject.toml": f'[project]\nname = "mine"\ndependencies = ["tiny @ {wheel.as_uri()}"]\n'},
        {"pyproject.toml": '[project]\nname = "mine"\n'},
    )
    old, new = (revision_side(repo, rev, tmp_path / "cache") for rev in ("HEAD~1", "HEAD"))
    assert new.python == sys.executable
    assert old.python.startswith(str(tmp_path / "cache" / "environments"))
    assert imported(old, "import tiny, mine; print(tiny.VERSION)") == "1.0"
    find = "import importlib.util as u; print(u.find_spec('moebench').origin)"
    assert imported(old, find).endswith("/moebench/__init__.py")
    made = os.stat(old.python.removesuffix("/bin/python")).st_ino
    again = revision_side(repo, "HEAD~1", tmp_path / "cache")
    assert os.stat(again.python.removesuffix("/bin/python")).st_ino == made


def test_what_pip_cannot_install_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    repo, _ = repository(tmp_path, {"requirements.txt": "moebench-has-no-such-dependency\n"}, {"requirements.txt": ""})
    with pytest.raises(MoebenchError, match=r"pip cannot install the dependencies of that revision \(.*No matching"):
        revision_side(repo, "HEAD~1", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "environments").iterdir() if path.name != ".lock"]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements-dev.txt", "constraints.txt", "uv.lock"])
def test_every_declaration_counts(name, tmp_path):
    from moebench.bench.gate.environments import declarations

    before = declarations(tmp_path)
    (tmp_path / name).write_text('[project]\ndependencies = ["a"]\n')
    assert declarations(tmp_path) != before


def test_a_wheel(tmp_path):
    wheel = tiny_wheel(tmp_path, requires="Requires-Dist: moebench-has-no-such-dependency\n")
    side = wheel_side(wheel, tmp_path / "cache")
    assert side.name == "wheel tiny-1.0"
    assert side.cwd is None
    assert imported(side, "import tiny; print(tiny.VERSION)") == "1.0"
    assert wheel_side(wheel, tmp_path / "cache") == side


def test_an_environment(tmp_path):
    side = environment_side(type(tmp_path)(sys.executable))
    assert side.name == f"environment {sys.executable}"
    assert side.environment["PYTHONPATH"] == ""
    assert len(side.version) == 24
    folder = type(tmp_path)(sys.prefix)
    assert environment_side(folder).version == side.version


def bare(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return tmp_path / "bare"


def not_python(tmp_path):
    (tmp_path / "x.sh").write_text("#!/bin/sh\necho hi\n")
    (tmp_path / "x.sh").chmod(0o755)
    return tmp_path / "x.sh"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: revision_side(repository(p, OURS)[0], "nonsense", p), "no revision 'nonsense'.*`git fetch`"),
        (lambda p: revision_side(repository(p, OURS)[0], "--all", p), "no revision '--all'"),
        (lambda p: revision_side(p, "HEAD", p), "git finds no repository at"),
        (lambda p: revision_side(p / "absent", "HEAD", p), "git finds no repository at"),
        (lambda p: revision_side(old(p), "HEAD~1", p / "c"), "has no bench/worker.py"),
        (lambda p: wheel_side(p / "no.whl", p), "is no wheel"),
        (lambda p: environment_side(p / "absent"), "there is no Python at"),
        (lambda p: environment_side(bare(p)), r"cannot import moebench \(ModuleNotFoundError.*pip install moebench"),
        (lambda p: environment_side(not_python(p)), "does not behave like Python"),
    ],
)
def test_mistakes_are_one_sentence(make, words, tmp_path):
    with pytest.raises(MoebenchError, match=words) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def old(tmp_path):
    return repository(tmp_path, {"a.txt": ""}, OURS)[0]
