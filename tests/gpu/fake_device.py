"""A device that needs no hardware: its tensors say device ``meta``, hold numbers, and refuse to meet a CPU tensor.

``with Elsewhere():`` makes everything that is put on or created on ``meta`` a tensor of this device. Operators compute
on the CPU; one with a tensor of each place raises, as a GPU's would, so that a tensor left behind is found.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
MOVES = ("aten::_to_copy", "aten::copy_")


class There(torch.Tensor):
    """A tensor of the fake device around one of the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=NAME
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Literals(TorchFunctionMode):
    """``torch.tensor`` makes its tensors on ``meta`` without any operator, and so without numbers; this keeps them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return function(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return function(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """While it is on, the device is there; ``seen`` counts operators that ran on it."""

    def __init__(self):
        super().__init__()
        self.seen, self.literals = 0, Literals()

    def __enter__(self):
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, There)]
        self.seen += bool(found)
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """Compute an operator on the CPU and return its results where it would have left them."""
    name = function._schema.name
    leaves = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = any(isinstance(one, There) for one in leaves)
    wanted = kwargs.get("device")
    if there and name not in MOVES and any(not isinstance(one, There) and one.dim() for one in leaves):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    goes_there = there if wanted is None else torch.device(wanted).type == NAME
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    if name.endswith("_") and function._schema.arguments[0].is_write:
        return args[0]  # in place: it is where it was
    return tree_map(lambda one: There(one) if isinstance(one, torch.Tensor) else one, result) if goes_there else result


def unwrapped(value):
    return value.held if isinstance(value, There) else value
