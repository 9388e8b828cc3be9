"""The value that tracing makes: a graph over the live model, and what it assumes of a batch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxcalib.tracing.errors import GuardError
from fxcalib.tracing.guards import Guard, LeafCheck, ValueGuard
from fxcalib.tracing.preserve import SavedTensors, preserved_attributes, same_random_numbers_again, saved_tensors
from fxcalib.tracing.structure import call_module, unflatten
from fxcalib.tracing.targets import Targets
from fxcalib.tracing.tracer import Recording
from fxcalib.tracing.writes import sources, storages, writers


@dataclass(frozen=True)
class BoundBatch:
    """A batch that satisfies all guards of a trace."""

    inputs: Mapping[str, Any]
    """Placeholder name -> tensor."""
    signature: tuple[Any, ...]
    """Sizes of all leaves of the batch."""


@dataclass(frozen=True, eq=False)
class TracedModel:
    """The graph of `model`'s forward with its sequential targets (and all other called modules) as opaque nodes.

    Nodes: placeholders for the tensors of a batch, `call_module` on live modules by qualified name, `call_function` for
    the glue between them, `get_attr` for weights and constants that the glue reads, one output.
    """

    model: nn.Module
    targets: Targets
    recording: Recording
    device: torch.device
    """Where the graph is to be run."""
    seconds: float
    """What tracing took."""

    @property
    def graph(self) -> fx.Graph:
        return self.recording.graph

    @property
    def leaf_checks(self) -> Mapping[fx.Node, LeafCheck]:
        return self.recording.leaf_checks

    @cached_property
    def guards(self) -> tuple[Guard, ...]:
        """Every assumption that the trace has baked in, with the model's source line."""
        return (*self.recording.shape_guards.listed(), *(v.listed() for v in self.recording.value_guards))

    @cached_property
    def symbols(self) -> Mapping[sympy.Symbol, sympy.Symbol]:
        """Readable names of symbolic sizes: `batch` and `sequence` for the first input of two or more dimensions."""
        return self.recording.inputs.symbols(self.expression)

    def expression(self, size: Any) -> sympy.Expr:
        """The simplified expression of a symbolic size, in the symbols of the trace."""
        if isinstance(size, torch.SymInt):
            return self.recording.shape_guards.simplify(size)
        return sympy.Integer(int(size))

    def readable(self, size: Any) -> sympy.Expr:
        """The expression of a size in `batch`, `sequence` and named input dimensions."""
        return self.expression(size).xreplace(dict(self.symbols))

    def bind(self, batch: Mapping[str, Any], kept: SavedTensors | None = None) -> BoundBatch:
        """Hold `batch` against all guards that can be checked before a module runs.

        What is computed for the guards may change the model. That is undone, unless it is to stay for the next batch
        that is bound: then `kept` is given and has what was there before.

        Raises:
            GuardError: the batch breaks a guard.
        """
        leaves, signature = self.recording.shape_guards.bind(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        inputs = {str(n.name): t for n, t in zip(placeholders, tensors, strict=True)}
        self._check_values(inputs, signature, kept)
        return BoundBatch(inputs, signature)

    def attribute(self, path: str) -> Any:
        """What a `get_attr` node of the graph reads."""
        constants = self.recording.constants
        return constants[path] if path in constants else operator.attrgetter(path)(self.model)

    def attribute_on_device(self, path: str) -> Any:
        """`attribute`, brought to the device where the graph runs."""
        value = self.attribute(path)
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def rebuild(self, leaves: list[Any]) -> Any:
        """The model's return value from the leaves that the graph's output node holds."""
        return unflatten(self.recording.outputs, *leaves)

    @cached_property
    def _value_program(self) -> list[fx.Node]:
        wanted = {node for guard in self.recording.value_guards for node in guard.nodes} | self._looked_at_first
        return self._program_for(wanted | {g.after for g in self.recording.value_guards if g.after is not None})

    @cached_property
    def _lasting_program(self) -> list[fx.Node]:
        """The value program, and whatever else leaves something on the model that it reads from the next batch on."""
        program = self._value_program
        while True:
            read = {s for node in program if node.op == "get_attr" for s in storages(node)}
            wanted = {*program, *(writer for writer, memory in self._writers.items() if memory & read)}
            if len(wanted) == len(program):
                return program
            program = self._program_for(wanted)

    def _program_for(self, wanted: set[fx.Node]) -> list[fx.Node]:
        for node in reversed(self.graph.nodes):
            if node in wanted and not self._follows_from_sizes(node):
                wanted.update(sources(node, self._writers))
        return [n for n in self.graph.nodes if n in wanted and n.op != "placeholder"]

    @cached_property
    def _writers(self) -> dict[fx.Node, set[Any]]:
        return writers(self.graph.nodes, self.recording.mutated_by)

    @cached_property
    def _due(self) -> dict[fx.Node, list[ValueGuard]]:
        """The node of the value program, or placeholder, after which each value guard is checked: a later one may write
        to what the guard is about."""
        due: dict[fx.Node, list[ValueGuard]] = {}
        for guard in self.recording.value_guards:
            due.setdefault(max(n for n in (*guard.nodes, guard.after) if n is not None), []).append(guard)
        return due

    @cached_property
    def written(self) -> tuple[fx.Node, ...]:
        """The placeholders and weights that the glue, or a module that they are passed to, writes to."""
        changed = {s for memory in self._writers.values() for s in memory}
        return tuple(n for n in self.graph.nodes if n.op in ("placeholder", "get_attr") and storages(n) & changed)

    def written_tensors(self, bound: BoundBatch) -> list[torch.Tensor]:
        """The tensors of a batch and of the model that running the graph on the batch changes."""
        nodes = self.written
        return [bound.inputs[n.name] if n.op == "placeholder" else self.attribute(str(n.target)) for n in nodes]

    @cached_property
    def _looked_at_first(self) -> set[fx.Node]:
        """Wrapped functions of the batch alone whose results may have other sizes for other data."""
        return {node for node in self.graph.nodes if "look_first" in node.meta}

    def _follows_from_sizes(self, node: fx.Node) -> bool:
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt):
            return False
        return bool(self.expression(size).free_symbols <= self.recording.shape_guards.names.keys())

    def _check_values(self, inputs: Mapping[str, Any], signature: tuple[Any, ...], kept: SavedTensors | None) -> None:
        shapes = self.recording.shape_guards
        program = self._value_program if kept is None else self._lasting_program
        if not program and not self._due:
            return
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = {}
        with torch.no_grad(), same_random_numbers_again(), self._model_unchanged(program, kept):
            for node in (*placeholders, *program):
                try:
                    if node.op == "placeholder":
                        values[node] = inputs[node.name].to(self.device, copy=True)
                    elif self._follows_from_sizes(node):
                        values[node] = shapes.number(node.meta["val"], signature)
                    else:
                        values[node] = run_node(self, node, values)
                except Exception as error:
                    raise GuardError(f"a guard cannot be computed on this batch: {error}") from error
                if node in self._looked_at_first:
                    shapes.check_leaf(self.leaf_checks[node], values[node], signature)
                for guard in self._due.get(node, ()):
                    if not guard.holds([values[n] for n in guard.nodes]):
                        raise GuardError(f"the trace assumes that {guard.listed()}")
            for node in self.written if kept is not None else ():
                if node in values and node.op == "get_attr" and values[node] is not self.attribute(str(node.target)):
                    self.attribute(str(node.target)).copy_(values[node])  # it lies on another device than the graph

    @contextmanager
    def _model_unchanged(self, program: Sequence[fx.Node], kept: SavedTensors | None) -> Iterator[None]:
        """What the program does to the model is undone, as the subgraphs will do it; with `kept`, if it fails."""
        called = {str(n.target): self.model.get_submodule(str(n.target)) for n in program if n.op == "call_module"}
        changed = [self.attribute(str(n.target)) for n in self.written if n.op == "get_attr"]
        changed += [buffer for module in called.values() for buffer in module.buffers()]
        inside = {f"{name}.{inner}": m for name, module in called.items() for inner, m in module.named_modules()}
        if kept is not None:
            kept.save(changed)
        with ExitStack() as undoing:
            undoing.enter_context(saved_tensors()).save(changed)
            undoing.enter_context(preserved_attributes(inside))
            yield
            if kept is not None:
                undoing.pop_all()

    def __str__(self) -> str:
        calls = [n for n in self.graph.nodes if n.op == "call_module"]
        glue = sum(n.op == "call_function" for n in self.graph.nodes)
        lines = [
            f"TracedModel of {type(self.model).__name__}: {len(calls)} module calls, {glue} glue operations, "
            f"{len(self.guards)} guards, {self.seconds:.2f} s",
            f"targets: {', '.join(self.targets.patterns)} ({len(self.targets.names)} modules)",
        ]
        return "\n".join([*lines, *(f"guard {guard}" for guard in self.guards)])


def run_node(traced: TracedModel, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The value of a node, given those of its inputs; a module runs where its weights are."""
    if node.op == "get_attr":
        same = (n for n in traced.written if n in values and (n.op, n.target) == (node.op, node.target))
        taken = next(same, None)  # what is written to, where it lies on another device, has to be one copy
        return traced.attribute_on_device(str(node.target)) if taken is None else values[taken]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "call_module":
        return call_module(traced.model.get_submodule(str(node.target)), args, kwargs, traced.device)
    assert callable(node.target)
    return node.target(*args, **kwargs)
