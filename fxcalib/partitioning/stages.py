"""Where each node of a graph runs, and which values are stored between subgraphs.

Modules, in-place operations and random operations are *fixed*: they run exactly once, in the first stage that needs
them. Every target opens a new stage. All other glue is pure and may be repeated: which values are stored between stages
and which are computed again is a vertex min-cut by bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxcalib.partitioning.subgraph import Subgraph, describe
from fxcalib.tracing import TracedModel
from fxcalib.tracing.graph import has_effect, is_call, is_check
from fxcalib.tracing.writes import storages, written_by

_HEAVY = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "einsum", "scaled_dot_product_attention", "convolution")
"""Glue that costs too much to be computed twice."""


class Stages:
    """Places nodes into stages. Fixed nodes run once, in one stage; pure nodes wherever they are needed."""

    def __init__(self, traced: TracedModel, targets: dict[fx.Node, int]) -> None:
        self._traced = traced
        self._nodes = list(traced.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._storages = {node: storages(node) for node in self._nodes}
        self._written = {node: written_by(node, traced.recording.mutated_by) for node in self._nodes}
        changed = {s for node in self._nodes for w in self._written[node] for s in self._storages[w]}
        self._kept = {s for n in traced.written if n.op == "get_attr" for s in self._storages[n]}
        """Memory of the model that is written to."""
        self._fixed = {n for n in self._nodes if n.op != "placeholder" and self._is_fixed(n, changed)}
        self._order = self._dependencies(changed)
        self._stage = self._place(targets)
        self._count = max(self._stage.values()) + 1
        self._available = self._availability()

    def _is_fixed(self, node: fx.Node, changed: set[Any]) -> bool:
        if node.op == "get_attr":
            return False
        heavy = isinstance(node.target, torch._ops.OpOverload) and node.target._overloadpacket.__name__ in _HEAVY
        # what reads a storage that is written to sees another value at another time
        touched = {s for n in (node, *node.all_input_nodes) for s in self._storages[n]}
        return has_effect(node) or heavy or bool(touched & changed)

    def _dependencies(self, changed: set[Any]) -> nx.DiGraph:
        """Data edges, and edges that keep an in-place write in its place among the other accesses of that storage."""
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_nodes_from(self._nodes)
        accesses: dict[Any, list[tuple[fx.Node, bool]]] = defaultdict(list)
        for node in self._nodes:
            graph.add_edges_from((source, node) for source in (*node.all_input_nodes, *node.meta.get("after", ())))
            writes = {s for w in self._written[node] for s in self._storages[w]}
            touched = {s for i in node.all_input_nodes for s in self._storages[i]} | writes
            objects = {("object", i) for i in node.all_input_nodes if self._holds_object(i)}
            for key in (touched & changed) | objects:
                writing = key in writes or (key in objects and is_call(node))
                for earlier, wrote in accesses[key]:
                    if (writing or wrote) and earlier is not node:
                        graph.add_edge(earlier, node)
                accesses[key].append((node, writing))
        return graph

    def _holds_object(self, node: fx.Node) -> bool:
        return node.op == "call_function" and has_effect(node) and not is_call(node) and "val" not in node.meta

    def _place(self, targets: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """Stage of every fixed node: the first that needs it; what follows the last target has a stage of its own."""
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
            elif is_check(node):
                earliest[node] = before  # before anything is computed with what it assumes
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

    def _needs(self, node: fx.Node, stage: int) -> set[fx.Node]:
        """What `stage` has to be given so that it can compute the inputs of `node`."""
        needed: set[fx.Node] = set()
        pending, seen = list(node.all_input_nodes), set(node.all_input_nodes)
        while pending:
            source = pending.pop()
            if source.op == "get_attr" or (source in self._fixed and self._stage[source] == stage):
                continue
            if self._available[source] < stage:
                needed.add(source)
            elif source.op != "placeholder":
                pending += [i for i in source.all_input_nodes if i not in seen]
                seen.update(source.all_input_nodes)
        return needed

    def cut(self) -> set[fx.Node]:
        """The values to store: those of the least bytes from which all that crosses a boundary can be computed."""
        wanted = {need for n in self._stage for need in self._needs(n, self._stage[n])}
        while True:
            stored = self._min_cut(wanted)
            more = {
                need
                for node in stored
                if node not in self._fixed and node.op != "placeholder"
                for need in self._needs(node, self._available[node])
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
        value = describe(self._traced, node)
        sizes = {s: 8 if s.name == "batch" else 2048 for s in value.bytes.free_symbols}
        return max(1, int(value.bytes.subs(sizes)))

    def subgraphs(self, stored: set[fx.Node]) -> list[Subgraph]:
        """The finished subgraphs, in order."""
        parts = [self._stage_nodes(stage, stored) for stage in range(self._count)]
        reads = [self._read_by(nodes) for nodes in parts]
        last_read = {node: stage for stage, nodes in enumerate(reads) for node in nodes}
        return [self._subgraph(stage, parts[stage], reads, last_read, stored) for stage in range(self._count)]

    def shared_state(self) -> tuple[str, ...]:
        """Buffers that the model changes in one stage and reads or changes in another as well."""
        places: dict[Any, set[int]] = defaultdict(set)
        for node, stage in self._stage.items():
            changed = {s for w in self._written[node] for s in self._storages[w]}
            read = {s for i in node.all_input_nodes if i.op == "get_attr" for s in self._storages[i]}
            for storage in (changed | read) & self._kept:
                places[storage].add(stage)
        apart = {storage for storage, stages in places.items() if len(stages) > 1}
        written = (n for n in self._traced.written if n.op == "get_attr" and self._storages[n] & apart)
        return tuple(dict.fromkeys(str(n.target) for n in written))

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
            traced=self._traced,
            index=stage,
            targets=tuple(name for name in calls if name in targets),
            module_names=tuple(calls),
            modules=tuple(self._traced.model.get_submodule(name) for name in calls),
            inputs=tuple(n.name for n in inputs),
            outputs=tuple(n.name for n in outputs),
            frees=tuple(n.name for n in [*inputs, *unread] if last_read.get(n, 0) == stage),
            writes=tuple(n.name for n in inputs if self._storages[n] & changed or self._holds_object(n)),
            borrowed=tuple(n.name for n in outputs if self._storages[n] & self._kept),
            values={n.name: describe(self._traced, n) for n in [*inputs, *outputs]},
            nodes=tuple(nodes),
        )
