"""The model that a user names: a folder, a config.json, an index, a GGUF file, or a name on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError
from ...suites.models.hub import is_hub_id
from .counts import Model
from .forms import Weights, stored_form, weights_in
from .readers import flat, read_model
from .sizes import bytes_text
from .stored_tensors import INDEX, header_sizes, index_total, parts_of


@dataclass(frozen=True)
class Described:
    """A model, and what is known of its bytes.

    ``stored`` is None where it is not known how the weights are stored; ``why`` then says why. ``origin`` says where
    its bytes come from, ``notes`` what one must know of them; ``folder`` is that of all safetensors, if they are here.
    """

    name: str
    model: Model
    stored: Weights | None
    origin: str
    notes: tuple[str, ...] = ()
    why: str = ""
    folder: Path | None = None


def describe(name: str) -> Described:
    """Return what can be known of the model; MoebenchError with a sentence where it cannot be found or read."""
    path = _path(name)
    if path.suffix == ".gguf":
        from .gguf_source import describe_gguf

        return describe_gguf(path)
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if path.is_file():
        return _file(path)
    if is_hub_id(name):
        return _folder(_fetched(name), name)
    raise MoebenchError(
        f"'{name}' is no model here; name a folder, a config.json, a *.safetensors.index.json, a *.gguf, or owner/name "
        f"of the hub."
    )


def _path(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()  # a name that is too long for a file raises here
    except (OSError, RuntimeError, ValueError):
        raise MoebenchError(f"'{name}' cannot be a file; name a folder, a file, or owner/name of the hub.") from None
    return path


def _file(path: Path) -> Described:
    content = read_json(path)
    if "weight_map" in content:
        return _folder(path.parent, path.resolve().parent.name)
    name = path.stem if path.stem != "config" else path.resolve().parent.name
    return _described(name, content, None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoebenchError(f"{path} cannot be read ({error.strerror}); fetch it again.") from None
    except (ValueError, RecursionError) as error:
        raise MoebenchError(f"{path} is no valid JSON ({error}); fetch it again.") from None
    if not isinstance(content, dict):
        raise MoebenchError(f"{path} holds no object; name a config.json or an index of safetensors.")
    return content


def _folder(folder: Path, name: str) -> Described:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return describe(str(files[0]))
        raise MoebenchError(f"{folder} has no config.json; name a folder with one, or a GGUF file.")
    return _described(name, read_json(folder / "config.json"), folder)


def _described(name: str, config: dict[str, Any], folder: Path | None) -> Described:
    model, own = read_model(config), flat(config)
    notes = []
    if own.get("num_nextn_predict_layers"):
        notes.append(f"{own['num_nextn_predict_layers']} layer(s) that only predict further tokens are left out")
    if "text_config" in config:
        notes.append("the language model alone; what sees or hears is left out")
    try:
        stored = weights_in(model, stored_form({**config, **own}))
    except MoebenchError as error:
        return Described(name, model, None, "config.json", tuple(notes), str(error))
    described = Described(name, model, stored, "config.json", tuple(notes))
    return described if folder is None else _with_files(described, stored, folder)


def _with_files(own: Described, stored: Weights, folder: Path) -> Described:
    """Take exact bytes from the headers of the files where all are there, else compare with the index's total."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    tensors = index.get("weight_map") or {}
    if not isinstance(tensors, dict) or not all(isinstance(file, str) for file in tensors.values()):
        raise MoebenchError(f"{folder / INDEX} names no files; fetch it again.")
    named = {folder / file for file in tensors.values()}
    files = sorted(named or folder.glob("*.safetensors"))
    if files and all(file.is_file() for file in files):
        parts, beyond = parts_of(header_sizes(files), len(own.model.layers))
        exact = Weights(stored.form, parts)
        notes = (*own.notes, _compared("what the files hold", exact.total, stored.total, beyond))
        return Described(own.name, own.model, exact, "safetensors headers", notes, folder=folder)
    total = index_total(index)
    if total is None:
        return own
    note = _compared("what the index tells", total, stored.total, 0)
    return Described(own.name, own.model, stored, "config.json, beside its index", (*own.notes, note))


def _compared(what: str, found: int, expected: int, beyond: int) -> str:
    left_out = f", {bytes_text(beyond)} beside the language model left out" if beyond else ""
    if found == expected:
        return f"{what} agrees with the configuration's arithmetic to the byte{left_out}"
    share = (found - expected) / expected
    return (
        f"{what} differs from the configuration's arithmetic: {bytes_text(found)} against {bytes_text(expected)} "
        f"({share:+.2%}){left_out}"
    )


def _fetched(name: str) -> Path:
    """Return a folder with config.json and, where there is one, the index of a model of the hub."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MoebenchError("models of the hub need huggingface_hub; run pip install 'moebench[models]'.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(name, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):  # a ValueError: no such name can be
        raise MoebenchError(
            f"the configuration of '{name}' could not be had from the hub; check name and network, or give its "
            f"config.json."
        ) from None
    with contextlib.suppress(EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        hf_hub_download(name, INDEX)  # small models have none, and a configuration does without
    return Path(config).parent
