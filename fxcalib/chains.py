"""A model as a chain of layers, without a trace: each layer's output is the next one's input.

The first batch runs through the whole model once, to see whether that is so. All batches then run through it with every
layer replaced by one that only notes its arguments, which costs no more than the glue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcalib.errors import ModelError
from fxcalib.planning import Part
from fxcalib.programs import Bound, Program
from fxcalib.tracing import Targets
from fxcalib.tracing.structure import flatten, unflatten

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class _Reference:
    """A tensor among the arguments of a layer: the value of this name."""

    name: str


@dataclass(frozen=True)
class _Call:
    """The arguments of one layer, with references in the place of tensors."""

    structure: Any
    leaves: tuple[Any, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves if isinstance(leaf, _Reference)))


@dataclass(frozen=True)
class _Result:
    """The form of a layer's result, which holds one tensor."""

    structure: Any
    leaves: tuple[Any, ...]
    place: int

    def around(self, hidden: torch.Tensor) -> Any:
        """A result of this form that holds `hidden`."""
        return unflatten(self.structure, *(hidden if i == self.place else x for i, x in enumerate(self.leaves)))


class ChainProgram(Program):
    """One subgraph for each layer.

    Raises:
        ModelError: the first batch shows that the model is no chain of these layers.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self.model = model
        self._names = targets.names
        self._layers = [model.get_submodule(name) for name in targets.names]
        self._slot = -1
        self._results: list[_Result] = []
        self._variants: list[tuple[_Call, ...]] = []

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        if self._slot < 0:
            self._inspect(batch)
        calls = self._stubbed(batch)
        names: dict[int, str] = {}
        values: dict[str, Any] = {}
        described = []
        for k, (structure, leaves) in enumerate(calls):
            slots: list[Any] = []
            for index, leaf in enumerate(leaves):
                if index == self._slot:
                    slots.append(_Reference(HIDDEN))
                    if k == 0:
                        values[HIDDEN] = leaf
                elif isinstance(leaf, torch.Tensor):
                    name = names.setdefault(id(leaf), f"argument_{len(names)}")
                    values[name] = leaf
                    slots.append(_Reference(name))
                else:
                    slots.append(leaf)
            described.append(_Call(structure, tuple(slots)))
        variant = tuple(described)
        if variant not in self._variants:
            self._variants.append(variant)
        return Bound(self._variants.index(variant), values, ())

    def _inspect(self, batch: Mapping[str, Any]) -> None:
        """Run the model once and hold every layer's input against the output of the layer before."""
        seen: list[str] = []
        previous: Any = None
        slots: set[int] = set()

        def look(k: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal previous
            seen.append(self._names[k])
            leaves = flatten((args, kwargs))[0]
            if previous is not None:
                found = [i for i, leaf in enumerate(leaves) if leaf is previous]
                if not found:
                    raise self._no_chain(f"the output of {seen[-2]} is not the input of {seen[-1]}")
                slots.add(found[0])
            result = type(layer).forward(layer, *args, **kwargs)
            outputs, structure = flatten(result)
            tensors = [i for i, leaf in enumerate(outputs) if isinstance(leaf, torch.Tensor)]
            if len(tensors) != 1:
                raise self._no_chain(f"{self._names[k]} returns {len(tensors)} tensors instead of one")
            previous = outputs[tensors[0]]
            kept = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs]
            self._results.append(_Result(structure, tuple(kept), tensors[0]))
            return result

        with _replaced(self._layers, look), torch.no_grad():
            self.model(**copy.deepcopy(dict(batch)))  # a forward may write to its inputs
        if seen != list(self._names):
            raise self._no_chain(f"its layers are called as {', '.join(seen) or 'none'}")
        if len(slots) > 1:
            raise self._no_chain("the layers take their input in different places")
        self._slot = slots.pop() if slots else 0

    def _stubbed(self, batch: Mapping[str, Any]) -> list[tuple[Any, list[Any]]]:
        calls: list[tuple[Any, list[Any]]] = []

        def note(k: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves, structure = flatten((args, kwargs))
            calls.append((structure, leaves))
            if k == len(self._layers) - 1:
                raise _Enough
            return self._results[k].around(leaves[self._slot])

        with _replaced(self._layers, note), torch.no_grad(), suppress(_Enough):
            self.model(**copy.deepcopy(dict(batch)))
        return calls

    def _no_chain(self, reason: str) -> ModelError:
        return ModelError(
            f"the layer_sequential pipeline cannot run {type(self.model).__name__}: {reason}. "
            "Use pipeline='sequential', which traces the model, or suspended=True"
        )

    def parts(self, variant: int) -> Sequence[Part]:
        last = len(self._names) - 1
        calls = self._variants[variant] if self._variants else ()
        return [
            Part(
                k,
                frozenset(f"{name}.{inner}" if inner else name for inner, _ in layer.named_modules()),
                calls[k].reads if calls else (),
                (HIDDEN,) if k < last else (),
            )
            for k, (name, layer) in enumerate(zip(self._names, self._layers, strict=True))
        ]

    def inputs(self, variant: int) -> tuple[str, ...]:
        calls = self._variants[variant] if self._variants else ()
        return tuple(dict.fromkeys(name for call in calls for name in call.reads))

    def targets(self, subgraph: int) -> tuple[str, ...]:
        return (self._names[subgraph],)

    def called(self, subgraph: int) -> Sequence[nn.Module]:
        return (self._layers[subgraph],)

    def run(
        self,
        variant: int,
        subgraph: int,
        values: Mapping[str, Any],
        signature: tuple[Any, ...],
        wanted: Collection[str],
    ) -> Mapping[str, Any]:
        call = self._variants[variant][subgraph]
        leaves = [values[leaf.name] if isinstance(leaf, _Reference) else leaf for leaf in call.leaves]
        args, kwargs = unflatten(call.structure, *leaves)
        return {HIDDEN: flatten(self._layers[subgraph](*args, **kwargs))[0][self._results[subgraph].place]}


class _Enough(Exception):
    """The last layer has been reached: the rest of the forward is of no interest."""


@contextmanager
def _replaced(layers: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Have each layer's forward answered by `call(position, layer, args, kwargs)`."""
    own = [layer.__dict__.get("forward") for layer in layers]

    def forward(k: int, layer: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: call(k, layer, args, kwargs)

    for k, layer in enumerate(layers):
        layer.__dict__["forward"] = forward(k, layer)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.__dict__.pop("forward")
            if before is not None:
                layer.__dict__["forward"] = before
