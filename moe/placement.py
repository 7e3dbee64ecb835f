"""Tensors inside of structures - stores, packed weights, sparsity rules, routings - put on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def placed(value: T, device: str | torch.device) -> T:
    """Return ``value`` with every tensor in it on ``device``; where all lie there already, they are the same tensors.

    Dataclasses, tuples, lists and mappings are gone through; anything else that is no tensor stays as it is.
    """
    put: T = _placed(value, torch.device(device))
    return put


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _placed(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_placed(one, device) for one in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(one, device) for one in value)
    if isinstance(value, Mapping):
        return {name: _placed(one, device) for name, one in value.items()}
    return value


def device_of(value: object) -> torch.device:
    """Return the device of the first tensor in ``value``; the CPU where there is none."""
    return next((tensor.device for tensor in _tensors(value)), torch.device("cpu"))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
