"""What of a view is drawn: repeated subgraphs once, straight chains of glue as one box, far-read values as tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fxcalib.viz.folding import Stretch, stretches, unfolded
from fxcalib.viz.view import EdgeView, GraphView, NodeView, SubgraphView, ValueView

FAR_READERS = 4
"""A value that this many clusters read is not drawn as that many edges but as a tag in each of them."""


@dataclass(frozen=True)
class Box:
    """One drawn node: a node of the view, or several glue operations that follow each other."""

    nodes: tuple[NodeView, ...]
    cluster: int | None
    """Number of the drawn subgraph; None for inputs and the result."""

    @property
    def id(self) -> str:
        return self.nodes[0].id


@dataclass(frozen=True)
class Tag:
    """Stands for a value from elsewhere in a cluster that reads it."""

    id: str
    cluster: int
    value: ValueView


@dataclass(frozen=True)
class Arrow:
    """One drawn edge."""

    source: str
    target: str
    values: tuple[ValueView, ...]
    crosses: bool
    loops: bool = False
    """Whether it leads from one repetition of a stretch to the next."""
    share: str = ""
    """Such as `12 of 60` where only some of the repetitions of the reading stretch read the value."""


@dataclass(frozen=True)
class Drawing:
    """The boxes, tags and arrows of a picture."""

    stretches: tuple[Stretch, ...]
    subgraphs: Mapping[int, SubgraphView]
    """The drawn ones, by number."""
    boxes: tuple[Box, ...]
    tags: tuple[Tag, ...]
    arrows: tuple[Arrow, ...]

    def order(self) -> list[tuple[str, str]]:
        """Pairs of ids, the first to be drawn above the second: each subgraph begins below the last one's end."""
        clusters = sorted(self.subgraphs)
        inside = {box.id: box.cluster for box in self.boxes} | {tag.id: tag.cluster for tag in self.tags}
        own = [a for a in self.arrows if not a.loops and inside[a.source] == inside[a.target]]
        fed, feeding = {a.target for a in own}, {a.source for a in own}
        first = {k: [i for i, c in inside.items() if c == k and i not in fed] for k in clusters}
        last = {k: [i for i, c in inside.items() if c == k and i not in feeding] for k in clusters}
        modules = {box.id for box in self.boxes if box.nodes[0].kind in ("target", "module")}
        return [
            (end, start)
            for above, below in pairwise(clusters)
            for end in ([i for i in last[above] if i in modules] or last[above])[-1:]
            for start in first[below]
        ]


def draw(view: GraphView, *, expand: bool = False) -> Drawing:
    """Choose what is drawn. With `expand`, every subgraph is drawn by itself."""
    chosen = unfolded(len(view.subgraphs)) if expand else stretches([s.same_as for s in view.subgraphs])
    drawn = {stretch.start + k for stretch in chosen for k in range(stretch.period)}
    layout = _Layout(view, chosen, drawn)
    boxes = _chains(layout)
    return _tagged(layout, boxes, tuple(chosen), {s.index: s for s in view.subgraphs if s.index in drawn})


@dataclass
class _Edge:
    value: ValueView
    crosses: bool
    loops: bool
    readers: set[int] = field(default_factory=set)


class _Layout:
    """Nodes and edges of the view after all repetitions have been mapped onto the first."""

    def __init__(self, view: GraphView, chosen: Sequence[Stretch], drawn: set[int]) -> None:
        self._stand_in = {
            start + repeat * stretch.period: start
            for stretch in chosen
            for start in range(stretch.start, stretch.start + stretch.period)
            for repeat in range(stretch.repeats)
        }
        self.repeats = {
            start: stretch.repeats
            for stretch in chosen
            for start in range(stretch.start, stretch.start + stretch.period)
        }
        self._stretch = {k: i for i, stretch in enumerate(chosen) for k in range(stretch.start, stretch.stop)}
        self._place = {node: (s.index, i) for s in view.subgraphs for i, node in enumerate(s.nodes)}
        self._ids = {s.index: s.nodes for s in view.subgraphs}
        hidden = {n.id for n in view.nodes if n.kind == "constant"}
        kept = [n for n in view.nodes if n.id not in hidden and (n.subgraph is None or n.subgraph in drawn)]
        self.nodes = {n.id: n for n in kept}
        self.edges: dict[tuple[str, str, str], _Edge] = {}
        for edge in view.edges:
            if edge.source not in hidden:
                self._add(edge)
        used = {key[i] for key in self.edges for i in (0, 1)}
        self.nodes = {i: n for i, n in self.nodes.items() if i in used or n.kind != "input"}

    def _mapped(self, identity: str) -> tuple[str, int | None]:
        if identity not in self._place:
            return identity, None
        subgraph, position = self._place[identity]
        return self._ids[self._stand_in[subgraph]][position], subgraph

    def _add(self, edge: EdgeView) -> None:
        source, start = self._mapped(edge.source)
        target, end = self._mapped(edge.target)
        loops = start is not None and end is not None and start != end and self._stretch[start] == self._stretch[end]
        loops = loops and (self._stand_in[start or 0] >= self._stand_in[end or 0])
        held = self.edges.setdefault((source, target, str(edge.value)), _Edge(edge.value, edge.crosses, loops))
        if end is not None:
            held.readers.add(end)

    def cluster(self, identity: str) -> int | None:
        return self.nodes[identity].subgraph


def _chains(layout: _Layout) -> list[Box]:
    """Glue that passes its only result to glue of the same cluster which reads nothing else becomes one box."""
    after: dict[str, set[str]] = defaultdict(set)
    before: dict[str, set[str]] = defaultdict(set)
    for source, target, _ in layout.edges:
        after[source].add(target)
        before[target].add(source)
    crossing = {source for (source, _, _), edge in layout.edges.items() if edge.crosses}
    follows: dict[str, str] = {}
    for source, targets in after.items():
        if len(targets) != 1 or source in crossing or layout.nodes[source].kind != "glue":
            continue
        target = next(iter(targets))
        alone = len(before[target]) == 1 and layout.nodes[target].kind == "glue"
        if alone and layout.cluster(source) == layout.cluster(target):
            follows[source] = target
    inner = set(follows.values())
    boxes = []
    for identity, node in layout.nodes.items():
        if identity in inner:
            continue
        chain = [node]
        while chain[-1].id in follows:
            chain.append(layout.nodes[follows[chain[-1].id]])
        boxes.append(Box(tuple(chain), node.subgraph))
    return boxes


def _tagged(
    layout: _Layout, boxes: list[Box], chosen: tuple[Stretch, ...], subgraphs: Mapping[int, SubgraphView]
) -> Drawing:
    box_of = {node.id: box for box in boxes for node in box.nodes}
    readers: dict[str, set[int | None]] = defaultdict(set)
    for (source, target, _), edge in layout.edges.items():
        if edge.crosses:
            readers[source].add(box_of[target].cluster)
    tags: dict[tuple[str, int], Tag] = {}
    grouped: dict[tuple[str, str, bool, bool, str], list[ValueView]] = {}
    for (source, target, _), edge in layout.edges.items():
        start, end = box_of[source].id, box_of[target].id
        if start == end and not edge.loops:
            continue
        cluster = box_of[target].cluster
        if edge.crosses and not edge.loops and cluster is not None and len(readers[source]) >= FAR_READERS:
            tag = tags.setdefault((source, cluster), Tag(f"tag:{cluster}:{source}", cluster, edge.value))
            start = tag.id
        key = (start, end, edge.crosses, edge.loops, _share(layout, cluster, edge))
        grouped.setdefault(key, []).append(edge.value)
    arrows = tuple(
        Arrow(start, end, tuple(values), crosses, loops, share)
        for (start, end, crosses, loops, share), values in grouped.items()
    )
    return Drawing(chosen, subgraphs, tuple(boxes), tuple(tags.values()), arrows)


def _share(layout: _Layout, cluster: int | None, edge: _Edge) -> str:
    """How many of the repetitions read the value, where that says something: not for the way in from outside."""
    if cluster is None or layout.repeats[cluster] == 1 or not edge.crosses or edge.loops:
        return ""
    count, all_of_them = len(edge.readers), layout.repeats[cluster]
    return "" if count in (1, all_of_them) else f"{count} of {all_of_them}"
