"""lm-eval's own tasks and model wrapper, used in parts: requests in, answers out, items judged. For workers only.

lm-eval builds the requests of a task, ``HFLM`` answers them, and the task judges the answers, as ``simple_evaluate``
has it, with the same seeds; but requests are answered piece by piece, so that a long evaluation can be resumed.
lm-eval is imported when it is first used: that takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...contracts import MoebenchError, unknown
from .folder import TASKS, task_folder

SEEDS = (0, 1234, 1234, 1234)
"""Of ``random``, numpy, torch and examples in the context: lm-eval's defaults."""

NEWLINE = "\n"
"""What stands before a text whose tokenizer has no token for its beginning or end."""

_TASKS: dict[tuple[tuple[str, ...], int | None], dict[str, Any]] = {}


def require_lm_eval() -> None:
    """Raise MoebenchError where lm-eval is not installed; quieten it where it is."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MoebenchError("tasks need lm-eval; run pip install 'moebench[lm-eval]'.")
    os.environ.setdefault("TQDM_DISABLE", "1")


def load_tasks(names: Sequence[str], items: int | None) -> dict[str, Any]:
    """Return lm-eval's tasks by name with the requests of their first ``items`` documents, built once per worker.

    Groups and tags come as the tasks in them. Names that are not ours are looked up among lm-eval's own, whose data
    come from the hub.
    """
    key = (tuple(names), items)
    if key not in _TASKS:
        _TASKS[key] = _load(names, items)
    for task in _TASKS[key].values():
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}
    return _TASKS[key]


def _load(names: Sequence[str], items: int | None) -> dict[str, Any]:
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder()), include_defaults=not set(names) <= set(TASKS))
    for name in names:
        if name not in manager.all_tasks:
            raise MoebenchError(unknown("task", name, manager.all_tasks))
    _seed()
    try:
        tasks: dict[str, Any] = manager.load(list(names))["tasks"]
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MoebenchError(
            f"the data of a task cannot be had ({reason}); go online or take {', '.join(TASKS)}."
        ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise MoebenchError(f"task '{name}' runs what a model wrote, or shows it pictures; leave it out.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[3])
        task.build_all_requests(limit=items, rank=0, world_size=1)
    return tasks


def _seed() -> None:
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])


def wrap(model: Any, tokenizer: Any, batch: int, window: int) -> Any:
    """Return lm-eval's ``HFLM`` around a transformers model; requests are cut to ``window`` tokens."""
    require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    longest = getattr(model.config, "max_position_embeddings", window)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = tokenizer.encode(NEWLINE, add_special_tokens=False)[0] if ends == (None, None) else None
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=min(window, longest),
        prefix_token_id=prefix,
    )


def answer(lm: Any, requests: Sequence[Any]) -> list[Any]:
    """Return what ``lm`` answers to each request, as many times as its task wants, in their order."""
    if any(request.request_type == "generate_until" for request in requests) and lm.eot_token_id is None:
        raise MoebenchError(
            f"task '{requests[0].task_name}' wants written answers, and the model's tokenizer has no token for their "
            f"end; leave it out of suite.tasks."
        )
    repeated = [request for request in requests for _ in range(request.repeats)]
    answers: list[Any] = [None] * len(repeated)
    for kind in dict.fromkeys(request.request_type for request in repeated):
        places = [place for place, request in enumerate(repeated) if request.request_type == kind]
        found = getattr(lm, kind)([repeated[place] for place in places], disable_tqdm=True)
        for place, one in zip(places, found, strict=True):
            answers[place] = one
    return answers


def give(requests: Sequence[Any], answers: Sequence[Any]) -> None:
    """Hand each request its answers, for its task to judge."""
    rest = iter(answers)
    for request in requests:
        request.resps = [next(rest) for _ in range(request.repeats)]
