"""The largest tensor over some columns, such as the logits of a loss: what exists at once and not what is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WidestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the bytes of the largest result whose last dimension is ``columns``; a view of an argument is none."""

    def __init__(self, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = columns
        self.bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        given = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.columns:
                self.bytes = max(self.bytes, 0 if _place(tensor) in given else tensor.nbytes)
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
