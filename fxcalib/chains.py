"""A model as a chain of layers, without a trace: each layer's output is the next one's input.

The first batch runs through the whole model once, to see whether that is so, and then through the chain, which must
give the same. All batches then run through the model with every layer replaced by one that only notes its arguments,
which costs no more than the glue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcalib.contexts import Autocast, Contexts
from fxcalib.errors import ModelError
from fxcalib.planning import Part
from fxcalib.programs import Bound, Program
from fxcalib.tracing import Targets
from fxcalib.tracing.preserve import unchanged
from fxcalib.tracing.structure import PLAIN, flatten, open_dataclasses, same_values, unflatten

HIDDEN = "hidden_states"
TOLERANCE = 0.01
"""Relative difference up to which the chain is said to give what the model gives: kernels may add in any order."""


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


@dataclass(frozen=True)
class _Seen:
    """What one layer was called with, and what it returned, in the model's own forward."""

    structure: Any
    leaves: tuple[Any, ...]
    """As they were when the layer was called; None for what comes from the layer before."""
    autocast: tuple[Autocast, ...]


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
        self._changing: set[int] = set()
        """Layers that write to their arguments in place."""
        self._variants: list[tuple[_Call, ...]] = []

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        if self._slot < 0:
            with unchanged(self.model):
                self._inspect(batch)
        return self._described(self._stubbed(batch))

    def _described(self, calls: Sequence[tuple[Any, list[Any]]]) -> Bound:
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
        """Hold the chain against the model: who feeds whom, what the layers are given, and what comes out."""
        outside = Contexts.current().autocast
        with unchanged(self.model):
            seen, last = self._watched(batch)
        try:
            calls = self._stubbed(batch)
            for name, real, (structure, leaves) in zip(self._names, seen, calls, strict=True):
                if real.autocast != outside:
                    modes = ", ".join(str(mode) for mode in real.autocast if mode not in outside)
                    raise self._no_chain(f"{name} is called under torch.autocast ({modes}), which a chain would leave")
                if real.structure != structure or not all(map(_same, real.leaves, leaves)):
                    raise self._no_chain(f"an argument of {name} besides its input depends on other layers")
            bound = self._described(calls)
            values = copy.deepcopy(dict(bound.values))
            for k, name in enumerate(self._names):
                try:
                    with torch.no_grad():
                        values |= self.run(bound.variant, k, values, (), (HIDDEN,))
                except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise self._no_chain(f"{name} fails outside of the model's own forward ({reason})") from error
            if not _close(values[HIDDEN], last):
                raise self._no_chain("its layers give another result one by one than in the model's own forward")
        except ModelError:
            self._slot = -1
            raise

    def _watched(self, batch: Mapping[str, Any]) -> tuple[list[_Seen], torch.Tensor]:
        """Run the model once; returns what its layers were given, and what the last one returned."""
        names: list[str] = []
        seen: list[_Seen] = []
        slots: set[int] = set()
        results: list[_Result] = []
        previous: torch.Tensor | None = None
        before: torch.Tensor | None = None
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(leaf: Any) -> Any:
            # masks and rotary tables are the same tensors in every layer: one copy serves all, and holds their identity
            if not isinstance(leaf, torch.Tensor):
                return None
            if id(leaf) not in kept or not _same(kept[id(leaf)][1], leaf):
                kept[id(leaf)] = leaf, leaf.clone()
            return kept[id(leaf)][1]

        def look(k: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal previous, before
            names.append(self._names[k])
            leaves, structure = flatten(open_dataclasses((args, kwargs)))
            slot = -1
            if previous is not None:
                found = [i for i, leaf in enumerate(leaves) if leaf is previous]
                if not found or not _same(before, previous):
                    raise self._no_chain(f"the output of {names[-2]} is not the input of {names[-1]}")
                slot = found[0]
                slots.add(slot)
            given = tuple(None if i == slot else keep(leaf) for i, leaf in enumerate(leaves))
            entering = None if slot < 0 else leaves[slot].clone()
            seen.append(_Seen(structure, given, Contexts.current().autocast))
            result = type(layer).forward(layer, *args, **kwargs)
            if not all(map(_same, given, leaves)) or (entering is not None and not _same(entering, leaves[slot])):
                self._changing.add(k)
            outputs, form = flatten(result)
            tensors = [i for i, leaf in enumerate(outputs) if isinstance(leaf, torch.Tensor)]
            if len(tensors) != 1:
                raise self._no_chain(f"{self._names[k]} returns {len(tensors)} tensors instead of one")
            previous = outputs[tensors[0]]
            before = previous.clone()
            others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs]
            results.append(_Result(form, tuple(others), tensors[0]))
            return result

        with _replaced(self._layers, look), torch.no_grad():
            self.model(**copy.deepcopy(dict(batch)))  # a forward may write to its inputs
        if names != list(self._names) or before is None:
            raise self._no_chain(f"its layers are called as {', '.join(names) or 'none'}")
        if len(slots) > 1:
            raise self._no_chain("the layers take their input in different places")
        self._slot = slots.pop() if slots else 0
        self._results = results
        return seen, before

    def _stubbed(self, batch: Mapping[str, Any]) -> list[tuple[Any, list[Any]]]:
        calls: list[tuple[Any, list[Any]]] = []
        hidden: Any = None
        before: Any = None

        def note(k: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
            if k != len(calls):
                raise self._other_way(f"calls {self._names[k]} where the first one calls {self._names[len(calls)]}")
            nonlocal hidden, before
            leaves, structure = flatten(open_dataclasses((args, kwargs)))
            if self._slot >= len(leaves) or not isinstance(leaves[self._slot], torch.Tensor):
                raise self._other_way(f"calls {self._names[k]} with other arguments than the first one")
            if k == 0:
                hidden = leaves[self._slot]
                before = hidden.clone()
            elif leaves[self._slot] is not hidden or not _same(before, hidden):
                raise self._other_way(f"changes the output of {self._names[k - 1]} before it calls {self._names[k]}")
            calls.append((structure, leaves))
            if k == len(self._layers) - 1:
                raise _Enough
            return self._results[k].around(leaves[self._slot])

        with _replaced(self._layers, note), torch.no_grad(), suppress(_Enough):
            self.model(**copy.deepcopy(dict(batch)))
        if len(calls) < len(self._layers):
            raise self._other_way(f"ends before it calls {self._names[len(calls)]}, which the first one calls")
        return calls

    def _other_way(self, what: str) -> ModelError:
        return ModelError(
            f"the layer_sequential pipeline cannot run {type(self.model).__name__} on all of this data: a batch "
            f"{what}. Calibrate on batches that take one way through the layers, or use pipeline='basic'"
        )

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
                calls[k].reads if calls and k in self._changing else (),
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
        leaves = [values[leaf.name] if isinstance(leaf, _Reference) else self._own(leaf) for leaf in call.leaves]
        args, kwargs = unflatten(call.structure, *leaves)
        return {HIDDEN: flatten(self._layers[subgraph](*args, **kwargs))[0][self._results[subgraph].place]}

    def _own(self, leaf: Any) -> Any:
        """A copy of an object such as a key-value cache, which a layer fills and which runs more than once."""
        if isinstance(leaf, PLAIN):
            return leaf
        # modules of the model are passed on as they are
        memo: dict[int, Any] = {id(module): module for module in self.model.modules()}
        return copy.deepcopy(leaf, memo)


def _same(first: Any, second: Any) -> bool:
    """Whether two tensors hold the same values. What is kept as None is not compared."""
    return first is None or (isinstance(second, torch.Tensor) and same_values(first, second))


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding; what is not finite in either is left out."""
    if _same(first, second):
        return True
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    both = first.isfinite() & second.isfinite()
    a, b = (tensor[both].double() for tensor in (first, second))
    return bool((a - b).norm() <= TOLERANCE * b.norm())


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
