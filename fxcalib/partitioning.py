"""Cuts a traced graph at its sequential targets into subgraphs that run one after another.

Modules, in-place operations and random operations run exactly once, each in the last subgraph from which all that need it
can still be reached; every target opens a new one. All other glue is pure and may be repeated: which values are stored
between subgraphs and which are computed again is a vertex min-cut by bytes over a networkx graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx, nn

from fxcalib.errors import OptionError
from fxcalib.tracing import GuardError, TraceError, TracedModel, trace
from fxcalib.tracing.torch_private import StorageWeakRef
from fxcalib.tracing.tracer import has_effect, is_mutable

_HEAVY = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "einsum", "scaled_dot_product_attention", "convolution")
"""Glue that costs too much to be computed twice."""


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
    """Inputs that it changes in place; they need a copy where the subgraph runs more than once on them."""
    values: Mapping[str, Value]
    """Shape, dtype and bytes of inputs and outputs."""
    nodes: tuple[fx.Node, ...]
    """The nodes in running order, repeated glue included."""

    def bytes(self, **sizes: int) -> int:
        """Bytes of the outputs at the given sizes, such as `bytes(batch=1, sequence=2048)`."""
        total = sum((self.values[name].bytes for name in self.outputs), sympy.Integer(0))
        return int(total.subs({s: sizes[s.name] for s in total.free_symbols}))

    def __str__(self) -> str:
        total = sum((self.values[name].bytes for name in self.outputs), sympy.Integer(0))
        lines = [f"subgraph {self.index}: {', '.join(self.module_names) or 'glue only'}"]
        lines += [f"  in   {self.values[name]}" for name in self.inputs]
        lines += [f"  out  {self.values[name]}" for name in self.outputs]
        lines.append(f"  frees {', '.join(self.frees) or 'nothing'}; carries {total} bytes on")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Partition:
    """The subgraphs of one traced model, in running order."""

    traced: TracedModel
    subgraphs: tuple[Subgraph, ...]
    targets_per_subgraph: int = 1

    def __iter__(self) -> Iterator[Subgraph]:
        return iter(self.subgraphs)

    def __len__(self) -> int:
        return len(self.subgraphs)

    def __getitem__(self, index: int) -> Subgraph:
        return self.subgraphs[index]

    @cached_property
    def variants(self) -> Variants:
        """This partition and those of the batches that broke its guards."""
        return Variants(self)

    def run(self, batch: Mapping[str, Any]) -> Any:
        """Run the subgraphs one after another: what `model(**batch)` returns, bit for bit.

        A batch that breaks a guard is traced anew (and the trace kept for the next of its kind).

        Raises:
            TraceError: the batch breaks a guard and cannot be traced either.
        """
        partition = self.variants.select(batch)
        try:
            return partition._run(batch)
        except GuardError:
            return self.variants.retrace(batch)._run(batch)

    def _run(self, batch: Mapping[str, Any]) -> Any:
        bound = self.traced.bind(batch)
        values = dict(bound.inputs)
        result: Any = None
        with torch.no_grad():
            for subgraph in self.subgraphs:
                outputs = run_subgraph(self.traced, subgraph, values, bound.signature)
                for name in subgraph.frees:
                    del values[name]
                result = outputs.pop("output", None)
                values.update(outputs)
        return self.traced.rebuild(result)

    def __str__(self) -> str:
        return "\n".join(str(subgraph) for subgraph in self.subgraphs)


class Variants:
    """The partitions of one model for batches that take different ways through its forward.

    Batches are matched against the guards of each; one that fits none is traced. All variants call the same targets in
    the same subgraphs, so that a subgraph can be calibrated on all batches.
    """

    def __init__(self, first: Partition) -> None:
        self.partitions = [first]

    @property
    def retraces(self) -> int:
        """How many batches had to be traced anew."""
        return len(self.partitions) - 1

    def select(self, batch: Mapping[str, Any]) -> Partition:
        """The first partition whose guards `batch` satisfies; traces where there is none."""
        for partition in self.partitions:
            try:
                partition.traced.bind(batch)
            except GuardError:
                continue
            return partition
        return self.retrace(batch)

    def retrace(self, batch: Mapping[str, Any]) -> Partition:
        """Trace and partition with `batch`.

        Raises:
            TraceError: the batch reaches other targets, or the same in another order, than the first one traced.
        """
        first = self.partitions[0]
        traced = trace(first.traced.model, batch, first.traced.targets.patterns, device=first.traced.device)
        again = partition(traced, first.targets_per_subgraph)
        if [s.targets for s in again] != [s.targets for s in first]:
            raise TraceError(
                "a batch takes another way through the sequential targets than the first one: "
                f"{[s.targets for s in again]} instead of {[s.targets for s in first]}"
            )
        self.partitions.append(again)
        return again


def partition(traced: TracedModel, targets_per_subgraph: int = 1) -> Partition:
    """Cut `traced` into subgraphs of `targets_per_subgraph` target calls each, and one for what follows the last target.

    Raises:
        OptionError: `targets_per_subgraph` is not positive.
        TraceError: the traced batch called no target.
    """
    if targets_per_subgraph < 1:
        raise OptionError(f"targets_per_subgraph must be at least 1, not {targets_per_subgraph}")
    names = set(traced.targets.names)
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target in names]
    if not calls:
        raise TraceError(f"the batch reached none of the sequential targets {', '.join(traced.targets.patterns)}")
    stages = _Stages(traced, {node: i // targets_per_subgraph for i, node in enumerate(calls)})
    stored = stages.cut()
    return Partition(traced, tuple(stages.subgraphs(stored)), targets_per_subgraph)


class _Stages:
    """Places nodes into stages. Fixed nodes run once, in one stage; pure nodes wherever they are needed."""

    def __init__(self, traced: TracedModel, targets: dict[fx.Node, int]) -> None:
        self._traced = traced
        self._nodes = list(traced.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._storages = {node: _storages(node) for node in self._nodes}
        self._written = {node: self._writes_of(node) for node in self._nodes}
        changed = {s for node in self._nodes for w in self._written[node] for s in self._storages[w]}
        self._fixed = {n for n in self._nodes if n.op != "placeholder" and self._is_fixed(n, changed)}
        self._order = self._dependencies()
        self._stage = self._place(targets)
        self._count = max(self._stage.values()) + 1
        self._available = self._availability()

    def _writes_of(self, node: fx.Node) -> list[fx.Node]:
        if node.op == "call_module":
            return self._traced.recording.mutated_by.get(node, [])
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            schema = node.target._schema.arguments
            named = {a.name: value for a, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
            written = [named.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
            return [w for w in written if isinstance(w, fx.Node)]
        return []

    def _is_fixed(self, node: fx.Node, changed: set[Any]) -> bool:
        if node.op == "get_attr":
            return False
        heavy = isinstance(node.target, torch._ops.OpOverload) and node.target._overloadpacket.__name__ in _HEAVY
        return has_effect(node) or heavy or bool(self._storages[node] & changed)

    def _dependencies(self) -> nx.DiGraph:
        """Data edges, and edges that keep every in-place write in its place among the other accesses of that storage."""
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(self._nodes)
        accesses: dict[Any, list[tuple[fx.Node, bool]]] = defaultdict(list)
        for node in self._nodes:
            graph.add_edges_from((source, node) for source in node.all_input_nodes)
            writes = {s for w in self._written[node] for s in self._storages[w]}
            touched = {s for i in node.all_input_nodes for s in self._storages[i]} | writes
            objects = {("object", i) for i in node.all_input_nodes if self._holds_object(i)}
            for key in touched | objects:
                writing = key in writes or (key in objects and node.op == "call_module")
                for earlier, wrote in accesses[key]:
                    if (writing or wrote) and earlier is not node:
                        graph.add_edge(earlier, node)
                accesses[key].append((node, writing))
        return graph

    def _holds_object(self, node: fx.Node) -> bool:
        return node.op == "call_function" and has_effect(node) and "val" not in node.meta

    def _place(self, targets: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """Stage of every fixed node: the first stage that needs it; behind the last target there is a stage of its own."""
        last = max(targets.values())
        tail = last + 1 if self._has_tail(targets) else last
        latest: dict[fx.Node, int] = {}
        for node in reversed(self._nodes):
            after = [latest[user] for user in self._order.successors(node) if user in latest]
            latest[node] = targets[node] if node in targets else min(after, default=tail)
        earliest: dict[fx.Node, int] = {}
        for node in self._nodes:
            before = max((earliest[p] for p in self._order.predecessors(node)), default=0)
            if node.op == "output":
                earliest[node] = tail
            elif node in targets:
                earliest[node] = targets[node]
            else:
                earliest[node] = max(before, latest[node]) if node in self._fixed else before
        return {n: earliest[n] for n in self._nodes if n in self._fixed}

    def _has_tail(self, targets: dict[fx.Node, int]) -> bool:
        behind: set[fx.Node] = set()
        last = max(targets, key=lambda n: self._position[n])
        for node in self._nodes:
            if node is last or any(i in behind for i in node.all_input_nodes):
                behind.add(node)
        return any(n.op == "call_module" and n not in targets for n in behind)

    def _availability(self) -> dict[fx.Node, int]:
        """The first stage in which each node can be computed."""
        available: dict[fx.Node, int] = {}
        for node in self._nodes:
            if node in self._stage:
                available[node] = self._stage[node]
            else:
                available[node] = max((available[i] for i in node.all_input_nodes), default=0)
        return available

    def _needs(self, node: fx.Node, stage: int, stored: set[fx.Node]) -> Iterator[fx.Node]:
        """What `stage` has to be given so that it can compute the inputs of `node`."""
        for source in node.all_input_nodes:
            if source.op == "get_attr" or (source in self._fixed and self._stage[source] == stage):
                continue
            if self._available[source] < stage:
                yield source
            elif source not in self._fixed and source.op != "placeholder" and source not in stored:
                yield from self._needs(source, stage, stored)

    def cut(self) -> set[fx.Node]:
        """The values to store: those of the least bytes from which all that crosses a boundary can be computed."""
        wanted = {need for n in self._stage for need in self._needs(n, self._stage[n], set())}
        while True:
            stored = self._min_cut(wanted)
            more = {
                need
                for node in stored
                if node not in self._fixed and node.op != "placeholder"
                for need in self._needs(node, self._available[node], set())
            }
            if more <= wanted:
                return stored
            wanted |= more

    def _min_cut(self, wanted: set[fx.Node]) -> set[fx.Node]:
        if not wanted:
            return set()
        flow: nx.DiGraph = nx.DiGraph()
        pending, seen = list(wanted), set(wanted)
        while pending:
            node = pending.pop()
            flow.add_edge((node, "in"), (node, "out"), capacity=self._cost(node))
            if node in self._fixed or node.op == "placeholder":
                flow.add_edge("source", (node, "in"))
                continue
            for source in node.all_input_nodes:
                if source.op != "get_attr":
                    flow.add_edge((source, "out"), (node, "in"))
                    if source not in seen:
                        seen.add(source)
                        pending.append(source)
        for node in wanted:
            flow.add_edge((node, "out"), "sink")
        if "source" not in flow:
            return set()
        _, (reached, _) = nx.minimum_cut(flow, "source", "sink")
        return {node for node in seen if (node, "in") in reached and (node, "out") not in reached}

    def _cost(self, node: fx.Node) -> int:
        """Bytes at a typical size; at least 1, so that what costs nothing is not stored without need."""
        value = _value(self._traced, node)
        sizes = {s: 8 if s.name == "batch" else 2048 for s in value.bytes.free_symbols}
        return max(1, int(value.bytes.subs(sizes)))

    def subgraphs(self, stored: set[fx.Node]) -> list[Subgraph]:
        """The finished subgraphs, in order."""
        parts = [self._stage_nodes(stage, stored) for stage in range(self._count)]
        reads = [self._read_by(nodes) for nodes in parts]
        last_read = {node: stage for stage, nodes in enumerate(reads) for node in nodes}
        return [self._subgraph(stage, parts[stage], reads, last_read, stored) for stage in range(self._count)]

    def _stage_nodes(self, stage: int, stored: set[fx.Node]) -> list[fx.Node]:
        fixed = [n for n, s in self._stage.items() if s == stage]
        made = [n for n in stored if n not in self._fixed and n.op != "placeholder" and self._available[n] == stage]
        chosen: set[fx.Node] = set()
        pending = [*fixed, *made]
        while pending:
            node = pending.pop()
            if node in chosen:
                continue
            chosen.add(node)
            for source in node.all_input_nodes:
                ready = source.op == "placeholder" or (source in self._fixed and self._stage[source] != stage)
                if not ready and not (source in stored and self._available[source] < stage):
                    pending.append(source)
        return sorted(chosen, key=lambda n: self._position[n])

    def _read_by(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        own = set(nodes)
        read = {i for n in nodes for i in n.all_input_nodes if i not in own}
        return sorted(read, key=lambda n: self._position[n])

    def _subgraph(
        self,
        stage: int,
        nodes: list[fx.Node],
        reads: list[list[fx.Node]],
        last_read: Mapping[fx.Node, int],
        stored: set[fx.Node],
    ) -> Subgraph:
        inputs = reads[stage]
        outputs = [n for n in nodes if n in stored and last_read.get(n, -1) > stage and self._available[n] == stage]
        changed = {s for n in nodes for w in self._written[n] for s in self._storages[w]}
        calls = [str(n.target) for n in nodes if n.op == "call_module"]
        targets = set(self._traced.targets.names)
        # what a batch holds but nothing reads goes with the first subgraph
        unread = [n for n in self._nodes if n.op == "placeholder" and n not in last_read] if stage == 0 else []
        return Subgraph(
            index=stage,
            targets=tuple(name for name in calls if name in targets),
            module_names=tuple(calls),
            modules=tuple(self._traced.model.get_submodule(name) for name in calls),
            inputs=tuple(n.name for n in inputs),
            outputs=tuple(n.name for n in outputs),
            frees=tuple(n.name for n in [*inputs, *unread] if last_read.get(n, 0) == stage),
            writes=tuple(n.name for n in inputs if self._storages[n] & changed or self._holds_object(n)),
            values={n.name: _value(self._traced, n) for n in [*inputs, *outputs]},
            nodes=tuple(nodes),
        )


def run_subgraph(
    traced: TracedModel, subgraph: Subgraph, values: Mapping[str, Any], signature: tuple[Any, ...]
) -> dict[str, Any]:
    """Run one subgraph on the values it reads; returns its outputs, and under `output` the leaves of the model's result.

    Intermediate tensors are dropped after their last use.

    Raises:
        GuardError: a module's result or a glue operation does not fit the trace.
    """
    program = _program(traced, subgraph)
    env: dict[fx.Node, Any] = {node: values[node.name] for node in program.inputs}
    outputs: dict[str, Any] = {}
    for node, call, dead in program.steps:
        env[node] = call(env, signature)
        if node.op == "output":
            outputs["output"] = env[node]
        elif node.name in program.outputs:
            outputs[node.name] = env[node]
        for name in dead:
            env.pop(name, None)
    return outputs


@dataclass(frozen=True)
class _Program:
    inputs: tuple[fx.Node, ...]
    outputs: frozenset[str]
    steps: tuple[tuple[fx.Node, Callable[[dict[fx.Node, Any], tuple[Any, ...]], Any], tuple[fx.Node, ...]], ...]


def _program(traced: TracedModel, subgraph: Subgraph) -> _Program:
    cached = subgraph.__dict__.get("_compiled")
    if isinstance(cached, _Program):
        return cached
    own = set(subgraph.nodes)
    inputs = tuple({i: None for n in subgraph.nodes for i in n.all_input_nodes if i not in own})
    last = {i: n for n in subgraph.nodes for i in n.all_input_nodes}
    dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for value, user in last.items():
        dead[user].append(value)
    modules = iter(subgraph.modules)
    steps = tuple(
        (n, _instruction(traced, n, next(modules) if n.op == "call_module" else None), tuple(dead[n]))
        for n in subgraph.nodes
    )
    program = _Program(inputs, frozenset(subgraph.outputs), steps)
    object.__setattr__(subgraph, "_compiled", program)
    return program


def _instruction(
    traced: TracedModel, node: fx.Node, module: nn.Module | None
) -> Callable[[dict[fx.Node, Any], tuple[Any, ...]], Any]:
    def arguments(env: dict[fx.Node, Any]) -> tuple[Any, Any]:
        return fx.node.map_arg((node.args, node.kwargs), env.__getitem__)  # type: ignore[return-value]

    if node.op == "output":
        return lambda env, signature: arguments(env)[0][0]
    if node.op == "get_attr":
        return lambda env, signature: traced.attribute_on_device(str(node.target))
    if module is not None:
        check, guards = traced.leaf_checks[node], traced.recording.shape_guards

        def call(env: dict[fx.Node, Any], signature: tuple[Any, ...]) -> Any:
            args, kwargs = arguments(env)
            result = module(*args, **kwargs)
            guards.check_leaf(check, result, signature)
            return result

        return call
    target = node.target
    assert callable(target)

    def glue(env: dict[fx.Node, Any], signature: tuple[Any, ...]) -> Any:
        args, kwargs = arguments(env)
        try:
            return target(*args, **kwargs)
        except GuardError:
            raise
        except Exception as error:
            raise GuardError(f"{node.name} ({target}) fails on this batch: {error}") from error

    return glue


def _leaf_values(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaf_values(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaf_values(item)
    else:
        yield value


def _storages(node: fx.Node) -> set[Any]:
    tensors = [v for v in _leaf_values(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return {StorageWeakRef(t.untyped_storage()) for t in tensors}


def _value(traced: TracedModel, node: fx.Node) -> Value:
    held = node.meta.get("val")
    if isinstance(held, torch.Tensor):
        shape = tuple(traced.readable(size) for size in held.shape)
        return Value(node.name, shape, held.dtype, sympy.Mul(*shape) * held.element_size())
    tensors = [v for v in _leaf_values(held) if isinstance(v, torch.Tensor)]
    total = sum((sympy.Mul(*(traced.readable(s) for s in t.shape)) * t.element_size() for t in tensors), sympy.Integer(0))
    return Value(node.name, None, None, total)


__all__ = ["Partition", "Subgraph", "Value", "Variants", "is_mutable", "partition", "run_subgraph"]
