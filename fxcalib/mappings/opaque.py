"""Labels through modules that the trace keeps whole: routers, experts, activations.

Such a module runs once on small random numbers that stand in for its arguments and parameters, under a dispatch mode
that applies the rules to each operation. Contractions with a parameter are not computed, so neither the size of the
weights nor where they lie matters; their results are random as well, so that a router chooses every expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fxcalib.mappings import rules
from fxcalib.mappings.values import Ledger, Value, WeightView

Leaf = Callable[[Value], Tensor | None]
"""What is known of a leaf module's input -> the labels of its output."""

# Weights up to this many elements may be computed with: biases and gains.
_SMALL = 1 << 20


class _Labelling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the labels of every tensor that was made while it was on."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._known: dict[int, tuple[Tensor, Value]] = {}

    def value(self, tensor: Tensor) -> Value:
        """What is known of `tensor`."""
        known = self._known.get(id(tensor))
        return Value(tuple(tensor.shape)) if known is None else known[1]

    def know(self, tensor: Tensor, labels: Tensor | None = None, weight: WeightView | None = None) -> None:
        """Keep what is known of `tensor`, and the tensor, so that no other takes its place in memory."""
        self._known[id(tensor)] = (tensor, Value(tuple(tensor.shape), labels, weight))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given, named = _tree_map(self.value, args), _tree_map(self.value, kwargs)
        values = list(rules.values_in((given, named)))
        if all(value.labels is None and value.weight is None for value in values):
            return func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[-1]
        if func._schema.is_mutable:
            if not rules.keeps(name, given, named):
                self._ledger.freeze(values, f"the operation {name}")
            return func(*args, **kwargs)
        weights = [value for value in values if value.weight is not None]
        if name in rules.CONTRACTIONS and weights:
            left, right, _ = rules.operands(name, given, named)
            dtype = next(each.dtype for each in args if isinstance(each, Tensor))
            result = torch.randn(_numbers(left.shape[:-1] + right.shape[-1:])).to(dtype)
        elif any(math.prod(_numbers(value.shape)) > _SMALL for value in weights):
            shaped = func(*_tree_map(_on_meta, args), **_tree_map(_on_meta, kwargs))
            result = _tree_map(lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape), shaped)
        else:
            result = func(*args, **kwargs)
        tensors = list(_tensors(result))
        found = rules.apply(name, given, named, [tuple(tensor.shape) for tensor in tensors], self._ledger)
        for tensor, value in zip(tensors, found, strict=True):
            self.know(tensor, value.labels, value.weight)
        return result


def run_labelled(
    module: nn.Module,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    ledger: Ledger,
) -> Tensor | None:
    """Follow labels through the forward of `module`, called `name` in the model; the labels of its result.

    Args:
        args, kwargs: as the module is called, with a pair of a stand-in tensor and its labels in place of each tensor.
        leaves: modules in it that are not looked into, by qualified name. All of them have to be reached.
        ledger: is told what freezes and what reads; labels that leave the module in more than one tensor are frozen.

    Raises:
        LookupError: a leaf was not reached. Whatever else the module's own forward raises comes out as it is.
    """
    mode = _Labelling(ledger)
    reached: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        given, named = _arguments(mode, args), _arguments(mode, dict(kwargs))
        stand_ins = _stand_ins(mode, module, name)
        inside = {f"{name}.{path}" if name else path: inner for path, inner in module.named_modules() if path}
        stack.enter_context(_replaced({inside[n]: _leaf(mode, n, inside[n], leaves[n], reached) for n in leaves}))
        stack.enter_context(mode)
        output = functional_call(module, stand_ins, given, named)
    missed = leaves.keys() - reached
    if missed:
        raise LookupError(f"{min(missed)} was not called")
    if isinstance(output, Tensor):
        return mode.value(output).labels
    ledger.freeze([mode.value(tensor) for tensor in _tensors(output)], f"the results of {name}")
    return None


def _leaf(mode: _Labelling, name: str, module: nn.Module, leaf: Leaf, reached: set[str]) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        reached.add(name)
        width = module.out_features if isinstance(module, nn.Linear) else inputs.shape[-1]
        output = torch.randn(*inputs.shape[:-1], width).to(inputs.dtype)
        mode.know(output, leaf(mode.value(inputs)))
        return output

    return forward


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Other forwards for these modules, whatever forwards they have."""
    missing = object()
    before = {module: module.__dict__.get("forward", missing) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, kept in before.items():
            if kept is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = kept


def _stand_ins(mode: _Labelling, module: nn.Module, name: str) -> dict[str, Tensor]:
    """Zeros in the place of parameters and buffers, without memory for the parameters."""
    made: dict[str, Tensor] = {}
    for path, parameter in module.named_parameters():
        made[path] = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        view = WeightView(f"{name}.{path}" if name else path, tuple(range(parameter.dim())))
        mode.know(made[path], weight=view)
    for path, buffer in module.named_buffers():
        made[path] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return made


def _arguments(mode: _Labelling, nested: Any) -> Any:
    if isinstance(nested, tuple) and len(nested) == 2 and isinstance(nested[0], Tensor):
        mode.know(*nested)
        return nested[0]
    if isinstance(nested, (tuple, list)):
        return type(nested)(_arguments(mode, each) for each in nested)
    if isinstance(nested, dict):
        return {key: _arguments(mode, each) for key, each in nested.items()}
    return nested


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for each in nested:
            yield from _tensors(each)
    elif isinstance(nested, Mapping):
        yield from _tensors(tuple(nested.values()))


def _tree_map(function: Callable[[Tensor], Any], nested: Any) -> Any:
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, (tuple, list)):
        return [_tree_map(function, each) for each in nested]
    if isinstance(nested, dict):
        return {key: _tree_map(function, each) for key, each in nested.items()}
    return nested


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _numbers(shape: Sequence[object]) -> list[int]:
    return [int(str(size)) for size in shape]
