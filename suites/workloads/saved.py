"""What a training step keeps for its backward pass, counted exactly and not by the memory of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def saved_bytes(step: Callable[[], Tensor], owned: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages that ``step`` saves for backward, ``owned`` (weights, inputs) left out.

    Every storage counts once and whole, however many views of it are saved.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, Tensor] = {}  # tensors, not pointers alone: memory that is freed may be given out again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    total = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)
    del loss
    return total


class WidestResult(TorchDispatchMode):
    """Remembers the bytes of the largest result whose last dimension is ``columns``."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.bytes = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.columns:
                self.bytes = max(self.bytes, tensor.nbytes)
        return result
