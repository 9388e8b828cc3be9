"""One run of a wrapped function while a model is traced, and what its result may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxcalib.tracing.errors import TraceError
from fxcalib.tracing.graph import is_mutable
from fxcalib.tracing.structure import flatten, is_symbolic, same_values
from fxcalib.tracing.torch_private import FakeTensor


class FunctionRun:
    """Calls the function, and looks at what it returns and at what it changes."""

    def __init__(self, name: str, original: Callable[..., Any], *, on_fakes: Callable[[], bool]) -> None:
        self.name, self._original, self._on_fakes = name, original, on_fakes
        self.changed: set[int] = set()
        """Which leaves of the arguments were written to, as far as real stand-ins show it."""
        self.stood_in = False
        """Whether the result comes from real stand-ins of the arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function.

        Raises:
            TraceError: the result holds what a trace cannot follow.
        """
        if self._on_fakes():
            result = self._original(*args, **kwargs)
        else:
            self.stood_in = True
            leaves = flatten((args, kwargs))[0]
            before = [leaf.clone() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
            result = self._original(*args, **kwargs)
            pairs = enumerate(zip(before, leaves, strict=True))
            self.changed = {i for i, (old, new) in pairs if old is not None and not same_values(old, new)}
        for leaf in flatten(result)[0]:
            self._refuse(leaf)
        return result

    def _refuse(self, leaf: Any) -> None:
        if isinstance(leaf, torch.Tensor):
            if self._on_fakes() and not isinstance(leaf, FakeTensor):
                raise TraceError(f"the wrapped function {self.name} made a real tensor of values that are not known")
        elif not is_symbolic(leaf) and is_mutable(leaf):
            raise TraceError(
                f"the wrapped function {self.name} returns a {type(leaf).__name__}, which a trace cannot follow: wrap "
                "one that returns tensors and numbers, in tuples, lists, dicts or a ModelOutput",
                kind="unsupported type",
            )


def sized_as_given(result: Any, given: list[Any]) -> bool:
    """Whether each tensor of `result` has the sizes of an argument, as elementwise functions return them."""
    shapes = [str(tuple(x.shape)) for x in given if isinstance(x, torch.Tensor)]
    return all(str(tuple(x.shape)) in shapes for x in flatten(result)[0] if isinstance(x, torch.Tensor))
