"""A stretch of a traced graph that runs in one go, and how it is run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxcalib.tracing import GuardError, TracedModel
from fxcalib.tracing.torch_private import FakeTensor

Instruction = Callable[[dict[fx.Node, Any], tuple[Any, ...]], Any]
"""Computes one node from the values of its inputs and the signature of the batch."""


@dataclass(frozen=True)
class Value:
    """One value of the graph as the partition sees it."""

    name: str
    shape: tuple[sympy.Expr, ...] | None
    """Sizes in `batch`, `sequence`, ...; None for anything but a tensor."""
    dtype: torch.dtype | None
    bytes: sympy.Expr
    """Bytes as an expression of the same sizes; 0 for what is not a tensor."""

    def __str__(self) -> str:
        if self.shape is None:
            return self.name
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A stretch of the graph that runs in one go."""

    traced: TracedModel
    index: int
    targets: tuple[str, ...]
    """Qualified names of the sequential targets it calls, in call order."""
    module_names: tuple[str, ...]
    """Qualified names of all modules it calls, in call order."""
    modules: tuple[nn.Module, ...]
    """The live modules, in call order."""
    inputs: tuple[str, ...]
    """Values it reads from the batch and from earlier subgraphs."""
    outputs: tuple[str, ...]
    """Values it makes that later subgraphs read."""
    frees: tuple[str, ...]
    """Inputs that no later subgraph reads."""
    writes: tuple[str, ...]
    """Inputs whose memory it changes in place; they need a copy where the subgraph runs more than once on them."""
    borrowed: tuple[str, ...]
    """Outputs that lie in buffers of the model which the next batch changes; they need a copy if it runs first."""
    values: Mapping[str, Value]
    """Shape, dtype and bytes of inputs and outputs."""
    nodes: tuple[fx.Node, ...]
    """The nodes in running order, repeated glue included."""

    def bytes(self, **sizes: int) -> int:
        """Bytes of the outputs at the given sizes, such as `bytes(batch=1, sequence=2048)`."""
        total = sum((self.values[name].bytes for name in self.outputs), sympy.Integer(0))
        return int(total.subs({s: sizes[s.name] for s in total.free_symbols}))

    @cached_property
    def written(self) -> tuple[fx.Node, ...]:
        """Its nodes for those buffers that the glue, or a module that they are passed to, writes to."""
        own = set(self.nodes)
        return tuple(n for n in self.traced.written if n.op == "get_attr" and n in own)

    @cached_property
    def _program(self) -> _Program:
        return _compile(self)

    def run(self, values: Mapping[str, Any], signature: tuple[Any, ...]) -> dict[str, Any]:
        """Run on `values`, by name; returns the outputs, and under the output node's name the leaves of the result.

        Intermediate tensors are dropped after their last use. `signature` is that of the bound batch.

        Raises:
            GuardError: a module's result or a glue operation does not fit the trace.
        """
        program = self._program
        env: dict[Any, Any] = {node: values[node.name] for node in program.inputs}
        outputs: dict[str, Any] = {}
        for node, instruction, dead in program.steps:
            env[node] = instruction(env, signature)
            if node.op == "output" or node.name in program.outputs:
                outputs[node.name] = env[node]
            for name in dead:
                env.pop(name, None)
        for path in program.written:
            if env[path] is not (own := self.traced.attribute(path)):  # it lies on another device than the graph
                own.copy_(env[path])
        return outputs

    def __str__(self) -> str:
        total = sum((self.values[name].bytes for name in self.outputs), sympy.Integer(0))
        lines = [f"subgraph {self.index}: {', '.join(self.module_names) or 'glue only'}"]
        lines += [f"  in   {self.values[name]}" for name in self.inputs]
        lines += [f"  out  {self.values[name]}" for name in self.outputs]
        lines.append(f"  frees {', '.join(self.frees) or 'nothing'}; carries {total} bytes on")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Program:
    """The nodes of a subgraph as instructions, each with the values that are dropped after it."""

    inputs: tuple[fx.Node, ...]
    outputs: frozenset[str]
    steps: tuple[tuple[fx.Node, Instruction, tuple[fx.Node, ...]], ...]
    written: tuple[str, ...]
    """Paths of what `Subgraph.written` names."""


def _compile(subgraph: Subgraph) -> _Program:
    own = set(subgraph.nodes)
    inputs = tuple({i: None for n in subgraph.nodes for i in n.all_input_nodes if i not in own})
    last = {i: n for n in subgraph.nodes for i in n.all_input_nodes}
    dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for value, user in last.items():
        dead[user].append(value)
    modules = iter(subgraph.modules)
    steps = tuple(
        (n, _instruction(subgraph.traced, n, next(modules) if n.op == "call_module" else None), tuple(dead[n]))
        for n in subgraph.nodes
    )
    written = dict.fromkeys(str(n.target) for n in subgraph.written)
    return _Program(inputs, frozenset(subgraph.outputs), steps, tuple(written))


def _instruction(traced: TracedModel, node: fx.Node, module: nn.Module | None) -> Instruction:
    def arguments(env: dict[fx.Node, Any]) -> tuple[Any, Any]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        return args, kwargs

    if node.op == "output":
        return lambda env, signature: arguments(env)[0][0]
    if node.op == "get_attr":
        path = str(node.target)
        if node not in traced.written:
            return lambda env, signature: traced.attribute_on_device(path)

        def taken_once(env: dict[Any, Any], signature: tuple[Any, ...]) -> Any:
            if path not in env:
                env[path] = traced.attribute_on_device(path)
            return env[path]

        return taken_once
    if module is not None:
        check, guards = traced.leaf_checks[node], traced.recording.shape_guards

        def call(env: dict[fx.Node, Any], signature: tuple[Any, ...]) -> Any:
            args, kwargs = arguments(env)
            result = module(*args, **kwargs)
            guards.check_leaf(check, result, signature)
            return result

        return call
    target, wrapped = node.target, traced.leaf_checks.get(node)
    assert callable(target)

    def glue(env: dict[fx.Node, Any], signature: tuple[Any, ...]) -> Any:
        args, kwargs = arguments(env)
        try:
            result = target(*args, **kwargs)
        except GuardError:
            raise
        except Exception as error:
            if wrapped is not None and any(isinstance(value, FakeTensor) for value in leaf_values((args, kwargs))):
                return traced.recording.shape_guards.example(wrapped, signature, traced.device)
            raise GuardError(f"{node.name} ({target}) fails on this batch: {error}") from error
        if wrapped is not None:
            traced.recording.shape_guards.check_leaf(wrapped, result, signature)
        return result

    return glue


def leaf_values(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaf_values(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaf_values(item)
    else:
        yield value


def describe(traced: TracedModel, node: fx.Node) -> Value:
    held = node.meta.get("val")
    if isinstance(held, torch.Tensor):
        shape = tuple(traced.readable(size) for size in held.shape)
        return Value(node.name, shape, held.dtype, sympy.Mul(*shape) * held.element_size())
    tensors = [v for v in leaf_values(held) if isinstance(v, torch.Tensor)]
    total = sum(
        (sympy.Mul(*(traced.readable(s) for s in t.shape)) * t.element_size() for t in tensors), sympy.Integer(0)
    )
    return Value(node.name, None, None, total)
