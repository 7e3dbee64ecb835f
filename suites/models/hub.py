"""Models of the Hugging Face hub: found in its local cache, downloaded when asked to. Imports no torch.

Only weights as safetensors, configuration and tokenizer are ever fetched; no Python of a repository, and pickles
(``*.bin``) where the user allows them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from ...contracts import MoebenchError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

KINDS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
PICKLES = ("*.bin",)


def is_hub_id(path: str) -> bool:
    """Whether ``path`` can only be the name of a model on the hub: ``owner/name``, and no folder here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().exists()


def cached_folder(path: str) -> Path:
    """Return the folder ``path``, or that of a hub id in the hub's local cache; MoebenchError where it is not there."""
    if not is_hub_id(path) or importlib.util.find_spec("huggingface_hub") is None:
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise MoebenchError(
            f"'{path}' is no local folder and not in the Hugging Face cache; give a folder, or run "
            f"`moebench models fetch hf model.path={path}` where there is a network."
        ) from None


def download(path: str, pickle: bool, progress: Callable[[str], None]) -> Path:
    """Return the folder of a hub id in the hub's local cache, after downloading what is not there yet."""
    if not is_hub_id(path):
        return cached_folder(path)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MoebenchError("downloading needs huggingface_hub; run pip install 'moebench[models]'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"hf: downloading {path}")
    kinds = [*KINDS, *(PICKLES if pickle else ())]
    try:
        return Path(snapshot_download(path, allow_patterns=kinds))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MoebenchError(f"'{path}' could not be downloaded ({first}); check the name and the network.") from None
