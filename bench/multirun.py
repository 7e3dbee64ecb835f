"""``moebench run -m``: one run for each combination of settings such as ``seed=0,1,2``, by any launcher of Hydra.

It is for hosts, models and seeds. Values of an axis belong into one run, as a list: what is compared is measured
together, and a sweep would tear it apart.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..contracts import MoebenchError, Registry
from .config import alias_experiment, register_groups
from .run import split_plugins

SWEEP_FLAGS = ("hydra/job_logging=none", "hydra/hydra_logging=none")
"""Hydra keeps no log files: what a run has to say is in its store."""


def multirun(settings: Sequence[str], flags: Sequence[str]) -> int:
    """Run every combination in a process of its own; return the worst exit status."""
    from hydra import main as hydra_main
    from omegaconf import DictConfig

    plugins, rest = split_plugins(settings)
    rest = alias_experiment(rest)
    registry = Registry.load(plugins)
    _check(rest, registry)
    register_groups(registry)
    command = [sys.executable, "-m", "moebench.bench", "run", *flags, *(f"plugin={path}" for path in plugins)]
    told = Path(tempfile.mkdtemp(prefix="moebench-multirun-"))

    def job(config: DictConfig) -> int:
        from hydra.core.hydra_config import HydraConfig

        own, number = list(HydraConfig.get().overrides.task), HydraConfig.get().job.num
        print(f"run {number}: {' '.join(own)}", file=sys.stderr, flush=True)
        status = subprocess.run([*command, *own], check=False).returncode
        (told / str(number)).write_text(str(status))  # a launcher may have this job in another process
        return status

    arguments = sys.argv
    sys.argv = ["moebench", "-m", *SWEEP_FLAGS, *rest]
    try:
        hydra_main(version_base="1.3", config_path="pkg://moebench.suites.conf", config_name="config")(job)()
        return max((int(path.read_text()) for path in told.iterdir()), default=1)
    finally:
        sys.argv = arguments
        shutil.rmtree(told, ignore_errors=True)


def _check(settings: Sequence[str], registry: Registry) -> None:
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in ("suite", "model"):
            for member in value.split(","):
                registry.get(name, member)
        if name.startswith(("axes.", "params.")) and "," in value and not value.startswith(("[", "{")):
            raise MoebenchError(
                f"-m over {name} would tear a comparison apart: without -m, give one list, {name}=[{value}]."
            )
