"""From a partition to what a picture of it shows. Nothing is drawn here and nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath

import sympy
import torch
from torch import fx, nn

from fxcalib.partitioning import Partition, Subgraph, Value
from fxcalib.partitioning.subgraph import describe as value_of
from fxcalib.report import Report, SubgraphReport
from fxcalib.tracing import TracedModel
from fxcalib.viz.flops import subgraph_flops
from fxcalib.viz.folding import first_of_each
from fxcalib.viz.view import (
    EdgeView,
    GraphView,
    InnerModule,
    Kind,
    MeasuredModule,
    MeasuredSubgraph,
    MemoryView,
    NodeView,
    RunView,
    SubgraphView,
    ValueView,
)

OUTPUT = "output"


def describe(
    partition: Partition, report: Report | None = None, *, name: str | None = None, memory: MemoryView | None = None
) -> GraphView:
    """Describe `partition` at the sizes of the batch it was traced with.

    Args:
        partition: of any model, also one on the meta device.
        report: of a run over the same model; its errors and times go with the subgraphs that call the same targets.
        name: of the model; default: its class.
        memory: what the steps of a calibration hold, from `predict_memory`.
    """
    traced = partition.traced
    sizes = batch_sizes(traced)
    nodes, edges = _Graph(partition, sizes).build()
    flops = subgraph_flops(partition)
    parts = [_subgraph(subgraph, partition, sizes, report, flops.get(subgraph.index)) for subgraph in partition]
    firsts = first_of_each(parts, nodes, edges)
    model = traced.model
    return GraphView(
        model=name or type(model).__name__,
        type=type(model).__name__,
        targets=traced.targets.patterns,
        sizes=sizes,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=weight_bytes([model]),
        subgraphs=tuple(_with_first(part, first) for part, first in zip(parts, firsts, strict=True)),
        nodes=tuple(nodes),
        edges=tuple(edges),
        guards=tuple(short_source(str(guard)) for guard in traced.guards),
        memory=memory,
        run=None if report is None else _run(report),
    )


def batch_sizes(traced: TracedModel) -> dict[str, int]:
    """`batch`, `sequence` and the other named sizes, as the traced batch had them."""
    hints: dict[str, int] = {}
    for value in traced.recording.inputs.values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            expression = traced.readable(size)
            if isinstance(size, torch.SymInt) and isinstance(expression, sympy.Symbol) and size.node.hint is not None:
                hints.setdefault(expression.name, int(size.node.hint))
    return hints


def evaluate(expression: sympy.Expr, sizes: Mapping[str, int]) -> int | None:
    """The number of `expression` at `sizes`; None where it holds a size that depends on data."""
    found = expression.subs({s: sizes[s.name] for s in expression.free_symbols if s.name in sizes})
    return int(found) if found.is_number else None


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers of `modules`, each tensor counted once."""
    held = {id(t): t for m in modules for t in [*m.parameters(), *m.buffers()]}
    return sum(t.numel() * t.element_size() for t in held.values())


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Elements of all parameters of `modules`, each tensor counted once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def view_of(value: Value, sizes: Mapping[str, int]) -> ValueView:
    """A value of the partition with its bytes at `sizes`."""
    return ValueView(
        value.name,
        "" if value.dtype is None else str(value.dtype).removeprefix("torch."),
        None if value.shape is None else tuple(str(size) for size in value.shape),
        str(value.bytes),
        evaluate(value.bytes, sizes),
    )


class _Graph:
    """Nodes and edges of a partition."""

    def __init__(self, partition: Partition, sizes: Mapping[str, int]) -> None:
        self._partition, self._traced, self._sizes = partition, partition.traced, sizes
        self._made: dict[fx.Node, int] = {}
        self._values: dict[fx.Node, ValueView] = {}

    def build(self) -> tuple[list[NodeView], list[EdgeView]]:
        batch = [self._input(node) for node in self._traced.graph.nodes if node.op == "placeholder"]
        nodes, edges = list(batch), list[EdgeView]()
        for subgraph in self._partition:
            modules = iter(subgraph.modules)
            own = set(subgraph.nodes)
            for node in subgraph.nodes:
                nodes.append(self._node(node, subgraph, next(modules) if node.op == "call_module" else None))
                for source in node.all_input_nodes:
                    inside = source in own
                    start = self._id(source, subgraph.index) if inside else self._carried(source)
                    end = self._id(node, subgraph.index)
                    edges.append(EdgeView(start, end, self._value(source), not inside))
            for node in subgraph.nodes:
                if node.name in subgraph.outputs:
                    self._made[node] = subgraph.index
        return nodes, edges

    def _id(self, node: fx.Node, subgraph: int) -> str:
        return OUTPUT if node.op == "output" else f"{subgraph}:{node.name}"

    def _carried(self, source: fx.Node) -> str:
        return f"batch:{source.name}" if source.op == "placeholder" else self._id(source, self._made[source])

    def _value(self, node: fx.Node) -> ValueView:
        if node not in self._values:
            self._values[node] = view_of(value_of(self._traced, node), self._sizes)
        return self._values[node]

    def _input(self, node: fx.Node) -> NodeView:
        return NodeView(f"batch:{node.name}", None, "input", node.name, "", 0, 0, "", self._value(node))

    def _node(self, node: fx.Node, subgraph: Subgraph, module: nn.Module | None) -> NodeView:
        kind, name, held = self._kind(node, module)
        return NodeView(
            id=self._id(node, subgraph.index),
            subgraph=None if node.op == "output" else subgraph.index,
            kind=kind,
            name=name,
            type="" if module is None else type(module).__name__,
            parameters=sum(t.numel() for t in held if isinstance(t, nn.Parameter)),
            bytes=sum(t.numel() * t.element_size() for t in held),
            source=short_source(str(node.meta.get("source", ""))),
            value=self._value(node),
        )

    def _kind(self, node: fx.Node, module: nn.Module | None) -> tuple[Kind, str, list[torch.Tensor]]:
        name = str(node.target)
        if module is not None:
            target = name in self._traced.targets.names
            return "target" if target else "module", name, [*module.parameters(), *module.buffers()]
        if node.op == "get_attr":
            if name in self._traced.recording.constants:
                return "constant", name, []
            tensor = self._traced.attribute(name)
            return "weight", name, [tensor] if isinstance(tensor, torch.Tensor) else []
        if node.op == "output":
            return "output", OUTPUT, []
        return "glue", operation_name(node.target), []


def operation_name(target: object) -> str:
    """Readable name of a glue operation, such as `aten.add.Tensor`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def short_source(source: str) -> str:
    """A source line without the part of its path that only says where packages are installed."""
    head, separator, line = source.partition("site-packages/")
    if separator:
        return head[: head.rfind("(") + 1] + line if "(" in head else line
    path, colon, rest = source.partition(".py:")
    if colon and PurePath(path).is_absolute():
        return "/".join(PurePath(path).parts[-2:]) + colon + rest
    return source


def _subgraph(
    subgraph: Subgraph, partition: Partition, sizes: Mapping[str, int], report: Report | None, flops: int | None
) -> SubgraphView:
    return SubgraphView(
        index=subgraph.index,
        targets=subgraph.targets,
        modules=subgraph.module_names,
        inside=tuple(
            InnerModule(f"{called}.{name}", type(inner).__name__)
            for called, module in zip(subgraph.module_names, subgraph.modules, strict=True)
            for name, inner in module.named_modules()
            if name
        ),
        nodes=tuple(f"{subgraph.index}:{n.name}" for n in subgraph.nodes if n.op != "output"),
        inputs=tuple(view_of(subgraph.values[name], sizes) for name in subgraph.inputs),
        outputs=tuple(view_of(subgraph.values[name], sizes) for name in subgraph.outputs),
        frees=subgraph.frees,
        parameters=parameter_count(subgraph.modules),
        bytes=weight_bytes(subgraph.modules),
        flops=flops,
        same_as=subgraph.index,
        measured=None if report is None else _measured(subgraph, len(partition), report),
    )


def _with_first(part: SubgraphView, first: int) -> SubgraphView:
    return replace(part, same_as=first)


def _measured(subgraph: Subgraph, count: int, report: Report) -> MeasuredSubgraph | None:
    times = _times(subgraph, count, report)
    called = subgraph.module_names
    modules = tuple(
        MeasuredModule(m.name, m.scheme, m.error, m.measure, m.seconds, m.notes)
        for m in report.modules
        if any(m.name == name or m.name.startswith(f"{name}.") for name in called)
    )
    if times is None and not modules:
        return None
    seconds = (0.0, 0.0, 0.0)
    if times is not None:
        seconds = (times.calibrate_seconds, times.commit_seconds, times.propagate_seconds)
    return MeasuredSubgraph(*seconds, modules)


def _times(subgraph: Subgraph, count: int, report: Report) -> SubgraphReport | None:
    for measured in report.subgraphs:
        same_place = measured.index == subgraph.index and len(report.subgraphs) == count
        if measured.targets == subgraph.targets and (subgraph.targets or same_place):
            return measured
    return None


def _run(report: Report) -> RunView:
    return RunView(
        title=f"{report.algorithm} {report.scheme}, {report.samples} samples, {report.tokens:,} tokens",
        seconds=report.seconds,
        peak_host_bytes=report.peak_host_bytes,
        peak_device_bytes=report.peak_device_bytes,
        perplexity_before=report.perplexity_before,
        perplexity_after=report.perplexity_after,
        warnings=report.warnings,
    )
