"""What a model asks of the data of tensors while it is traced, past the dispatcher: here every way to ask is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxcalib.tracing.torch_private import FakeTensor


class Questions(TorchFunctionMode):
    """Answers what the model asks of a tensor's data: `bool(x)`, `x.item()`, `x.tolist()`."""

    def __init__(self, answer: Callable[[torch.Tensor, bool], Any]) -> None:
        super().__init__()
        self._answer = answer
        self._tolist = FakeTensor.tolist

    def __enter__(self) -> Any:
        # fake tensors have a method of their own, which a mode does not see
        def tolist(tensor: FakeTensor) -> Any:
            answer = self._answer(tensor, False)
            return self._tolist(tensor) if answer is None else answer

        FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING:
            # a number stays a symbol as long as it can: a trace that has looked at it serves that number alone
            symbolic = _ASKING[func] and args[0].dtype != torch.bool
            answer = self._answer(args[0], symbolic)
            if answer is not None:
                return answer if func is not torch.Tensor.__bool__ else bool(answer)
        if func in _SIZED and len(args) > 1:
            args = (args[0], *self._numbers(args[1:]))
        if func is torch.Tensor.contiguous:
            # the method would not call the operator where the fake counts as contiguous: the real tensor may not be
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        if func in (torch.Tensor.__iter__, torch.Tensor.unbind, torch.unbind) and isinstance(args[0], FakeTensor):
            parts = _unbind(*args, **(kwargs or {}))
            return iter(parts) if func is torch.Tensor.__iter__ else parts
        if func is torch.tensor and isinstance(args[0], (list, tuple)):
            args = (_stacked(args[0]), *args[1:])
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, (list, tuple)) for i in index):
                args = (args[0], tuple(_stacked(i) for i in index), *args[2:])
        return func(*args, **(kwargs or {}))

    def _numbers(self, values: Any) -> Any:
        if isinstance(values, (tuple, list)):
            return type(values)(map(self._numbers, values))
        if not isinstance(values, FakeTensor) or values.ndim or values.is_floating_point():
            return values
        answer = self._answer(values, True)
        return values.item() if answer is None else answer


def _unbind(tensor: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    # the decomposition of torch squeezes only what is known to be 1, which symbols are not in opaque modules
    if not tensor.ndim:
        raise TypeError("iteration over a 0-d tensor")
    return tuple(tensor.select(dim, i) for i in range(int(tensor.shape[dim])))


def _stacked(values: Any) -> Any:
    """Nested lists that hold tensors as one tensor: `torch.tensor` would look at their data."""
    if not isinstance(values, (list, tuple)):
        return values
    parts = [_stacked(value) for value in values]
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return values
    return torch.stack([part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in parts])


_SIZED = (torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.Tensor.repeat, torch.reshape)
"""Functions that take tensors of one number for sizes, and look at their data past a mode."""

_ASKING = {
    torch.Tensor.__bool__: False,
    torch.Tensor.item: True,
    torch.Tensor.__int__: True,
    torch.Tensor.__index__: True,
    torch.Tensor.__float__: True,
}
"""Functions that look at data, and whether their result may be a symbol."""
