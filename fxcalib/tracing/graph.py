"""The nodes of a traced graph: how values become arguments, and which nodes do more than compute their value."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcalib.tracing.errors import TraceError, source_of_frame
from fxcalib.tracing.guards import ValueGuard
from fxcalib.tracing.structure import PLAIN, is_symbolic
from fxcalib.tracing.torch_private import (
    FakeTensor,
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    fetch_sym_proxy,
    get_proxy_slot,
    pytree,
    unset_fake_temporarily,
)


class GraphTracer(PythonKeyTracer):
    """Creates the nodes: weights become `get_attr` nodes of their path, other objects constants of the graph."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.record_stack_traces = False
        self.constants: dict[str, Any] = {}
        self.weights: dict[int, str] = {}
        self.existing: set[int] = set()
        self._objects: dict[int, tuple[object, fx.Node, tuple[int, ...]]] = {}
        self._literal = False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        self._literal = target is torch.ops.aten.lift_fresh_copy.default
        try:
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        finally:
            self._literal = False

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        # the parent's version looks `get_attr` targets up with getattr, which fails on dotted paths
        node = fx.proxy.TracerBase.create_node(self, kind, target, args, kwargs, *rest, **more)
        if kind == "call_function":
            node.meta["source"] = source_of_frame(sys._getframe(1))
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self._tensor(a)
        if is_symbolic(a):
            return super().create_arg(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self.object_node(a)

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        path = self.weights.get(id(tensor))
        if path is None:
            if isinstance(tensor, FakeTensor):
                raise TraceError(
                    f"a tensor of shape {tuple(tensor.shape)} was made where it could not be recorded",
                    kind="tensor that was not recorded",
                )
            if tensor.numel() > 1 and not self._literal and id(tensor) not in self.existing:
                raise TraceError(
                    f"a real tensor of shape {tuple(tensor.shape)} that was made while tracing would be baked in",
                    kind="real tensor baked in",
                )
            path = self._constant(tensor)
            self.weights[id(tensor)] = path
        node = self.create_node("get_attr", path, (), {})
        node.meta["val"] = tensor
        return node

    def forget(self) -> None:
        """Take attributes and objects for what they are when they are read next, not for what was recorded of them."""
        self._objects.clear()
        for node in self.graph.nodes:
            if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                self.tensor_tracker.pop(node.meta["val"], None)

    def _constant(self, value: object) -> str:
        path = f"_constant_{len(self.constants)}"
        self.constants[path] = value
        return path

    def object_node(self, value: object) -> fx.Node:
        """A node for an arbitrary object. Objects that calls may change (caches) are made once per replay."""
        if id(value) in self._objects:
            known, node, state = self._objects[id(value)]
            if state != _state(known):
                raise TraceError(
                    f"a {type(value).__name__} is changed between two modules that it is passed to: not recorded",
                    kind="mutated object",
                )
            return node
        if is_mutable(value):
            self._refuse_real(value)
            template, fakes = template_of(value)
            path = self._constant(template)
            made = [self._node_of(held, type(value).__name__) for held in fakes]
            node = self.create_node(
                "call_function", instantiate, (self.create_node("get_attr", path, (), {}), *made), {}
            )
        else:
            node = self.create_node("get_attr", self._constant(value), (), {})
        self._objects[id(value)] = (value, node, _state(value))
        return node

    def _refuse_real(self, value: object) -> None:
        for held in _held(value):
            if not isinstance(held, torch.Tensor) or isinstance(held, FakeTensor):
                continue
            if held.numel() > 1 and id(held) not in self.existing:
                raise TraceError(
                    f"a {type(value).__name__} holds a real tensor of shape {tuple(held.shape)} that was made while "
                    "tracing and would be baked in",
                    kind="real tensor baked in",
                )

    def _node_of(self, fake: Any, holder: str) -> fx.Node:
        slot: Any = None if is_symbolic(fake) else get_proxy_slot(fake, self, None)
        proxy: Any = fetch_sym_proxy(self)(fake) if is_symbolic(fake) else getattr(slot, "proxy", None)
        if isinstance(proxy, fx.Proxy):
            return proxy.node
        if id(fake) in self.weights:
            return self._tensor(fake)
        raise TraceError(
            f"a {holder} holds {fake}, which was made in a module that it was passed to", kind="mutated object"
        )

    def settle(self, values: Iterable[object]) -> None:
        """Take objects among `values` as a module has left them: it does the same to them in replay."""
        for value in values:
            if id(value) in self._objects:
                known, node, _ = self._objects[id(value)]
                self._objects[id(value)] = (known, node, _state(known))


class _Hole:
    """The place of a tensor in a template."""


@dataclass(frozen=True)
class Template:
    """An object without the tensors and sizes in it that depend on the batch."""

    value: object
    holes: tuple[_Hole, ...]


def template_of(value: object) -> tuple[Template, list[Any]]:
    """A copy of `value` with holes for the fake tensors and symbolic sizes in it, and these."""
    fakes: dict[int, Any] = {}
    for held in _held(value):
        if isinstance(held, FakeTensor) or is_symbolic(held):
            fakes.setdefault(id(held), held)
    holes = tuple(_Hole() for _ in fakes)
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        copied = copy.deepcopy(value, dict(zip(fakes, holes, strict=True)))
    return Template(copied, holes), list(fakes.values())


def instantiate(template: Template, *values: object) -> object:
    """A fresh object of `template` that holds `values`; a node function of traced graphs."""
    places = {id(hole): value for hole, value in zip(template.holes, values, strict=True)}
    return copy.deepcopy(template.value, places)


def _held(value: object) -> Iterator[object]:
    """What an object holds, in attributes and containers, at any depth."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if id(current) in seen or isinstance(current, (nn.Module, type, *PLAIN)):
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, dict):
            pending += current.values()
        elif isinstance(current, (tuple, list, set)):
            pending += current
        elif not isinstance(current, torch.Tensor) and not is_symbolic(current):
            pending += getattr(current, "__dict__", {}).values()


def _state(value: object) -> tuple[int, ...]:
    return tuple(id(held) for held in _held(value)) if is_mutable(value) else ()


def is_mutable(value: object) -> bool:
    """Whether module calls may change `value`: anything but modules, classes, functions and plain values."""
    return not isinstance(value, (nn.Module, type, pytree.TreeSpec, *PLAIN)) and not callable(value)


def is_check(node: fx.Node) -> bool:
    """Whether `node` holds a guard against what modules return."""
    return isinstance(getattr(node.target, "__self__", None), ValueGuard)


def is_wrapped(node: fx.Node) -> bool:
    """Whether `node` calls a function that was wrapped as one operation."""
    return "wrapped" in node.meta


def is_call(node: fx.Node) -> bool:
    """Whether `node` calls model code that the graph does not look into: a module or a wrapped function."""
    return node.op == "call_module" or is_wrapped(node)


def has_effect(node: fx.Node) -> bool:
    """Whether running `node` does more than compute its value: opaque calls, in-place and random operations."""
    if node.op != "call_function":
        return node.op != "get_attr"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        # a mutable object is made once: every reader has to see the same copy
        return target in (instantiate, setattr) or is_check(node) or is_wrapped(node)
    assertion = target in (torch.ops.aten._assert_async.msg, torch.ops.aten._assert_scalar.default)
    return assertion or target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
