"""Which subgraphs look the same up to names, and which stretches of them a picture draws once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fxcalib.viz.view import EdgeView, NodeView, SubgraphView

LONGEST_PERIOD = 12


@dataclass(frozen=True)
class Stretch:
    """`repeats` times the same `period` subgraphs, one after another, from number `start` on."""

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """Number of the first subgraph behind it."""
        return self.start + self.period * self.repeats

    def __str__(self) -> str:
        if self.repeats == 1:
            return str(self.start)
        plural = "" if self.period == 1 else "s"
        return f"{self.start} … {self.stop - 1}: {self.period} subgraph{plural} {self.repeats} times"


def first_of_each(subgraphs: Sequence[SubgraphView], nodes: Sequence[NodeView], edges: Sequence[EdgeView]) -> list[int]:
    """For each subgraph, the number of the first one with the same structure.

    Structure is what is computed, in which order, from what: classes and parameter counts of modules, names of
    operations, shapes and dtypes of values, and which nodes of the subgraph read which. Names do not count, nor from
    where a value is carried.
    """
    views = {node.id: node for node in nodes}
    incoming: dict[str, list[EdgeView]] = {}
    for edge in edges:
        incoming.setdefault(edge.target, []).append(edge)
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(_structure(subgraph, views, incoming), index) for index, subgraph in enumerate(subgraphs)]


def _structure(
    subgraph: SubgraphView, views: dict[str, NodeView], incoming: dict[str, list[EdgeView]]
) -> tuple[Hashable, ...]:
    position = {node: index for index, node in enumerate(subgraph.nodes)}
    outputs = {value.name for value in subgraph.outputs}
    rows: list[Hashable] = []
    for identity in subgraph.nodes:
        node = views[identity]
        reads = tuple(position.get(e.source, str(e.value)) for e in incoming.get(identity, ()))
        label = node.name if node.kind == "glue" else node.type
        rows.append((node.kind, label, node.parameters, node.bytes, str(node.value), reads, node.value.name in outputs))
    return tuple(rows)


def stretches(same_as: Sequence[int]) -> list[Stretch]:
    """Cover a sequence of structures by stretches, from the left, each time with the one that covers the most.

    >>> [str(s) for s in stretches([0, 1, 1, 1, 4, 5, 4, 5])]
    ['0', '1 … 3: 1 subgraph 3 times', '4 … 7: 2 subgraphs 2 times']
    """
    found: list[Stretch] = []
    start = 0
    while start < len(same_as):
        best = Stretch(start, 1, 1)
        for period in range(1, LONGEST_PERIOD + 1):
            block = same_as[start : start + period]
            repeats = 1
            while same_as[start + repeats * period : start + (repeats + 1) * period] == block:
                repeats += 1
            if repeats > 1 and repeats * period > best.stop - best.start:
                best = Stretch(start, period, repeats)
        found.append(best)
        start = best.stop
    return found


def unfolded(count: int) -> list[Stretch]:
    """Every subgraph by itself."""
    return [Stretch(index, 1, 1) for index in range(count)]
