"""A drawing as Graphviz text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import graphviz

from fxcalib.report import format_bytes
from fxcalib.viz.drawing import Arrow, Box, Drawing, Tag, draw
from fxcalib.viz.folding import Stretch
from fxcalib.viz.view import GraphView, NodeView, SubgraphView, TreeNode, TreeView, ValueView

FONT = "Helvetica"
TIMES = "\N{MULTIPLICATION SIGN}"
SPACE = "&#160;"
"""SVG drops plain spaces at the begin of a text."""
ROOM = SPACE * 8
"""Before another font on a line, whose place is fixed: the font that is shown may be wider than the one measured."""
SHORT_TYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "int8": "i8",
}
LONGEST_SIZE = 24
"""Characters of a size that is written out: those named after an input, such as `decoder_input_ids_0`, are."""
CHAIN_LINES = 8
"""Longest chain of glue that is written out line by line."""

INK, MUTED, CROSSING = "#1f2933", "#66727f", "#c2410c"
CLUSTER, CLUSTER_EDGE = "#f4f6f8", "#b6c0ca"
TARGET, TARGET_EDGE = "#cfe3fb", "#2563a8"
MODULE, MODULE_EDGE = "#e6efe4", "#5d8a54"
GLUE, GLUE_EDGE = "#ffffff", "#c4ccd4"
INPUT, INPUT_EDGE = "#fdf0d5", "#b7791f"
FAILING, FAILING_EDGE = "#fbd5d0", "#b42318"


def to_dot(view: GraphView, *, expand: bool = False) -> str:
    """The view as DOT. Repeated subgraphs are folded unless `expand`."""
    return str(_graph(draw(view, expand=expand), view).source)


def tree_to_dot(view: TreeView) -> str:
    """The module tree of a model that cannot be traced, as DOT."""
    return str(_tree(view).source)


def number(count: float) -> str:
    """`count` as short text, such as `6.8 M`."""
    for unit in ("", " K", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def shape_text(value: ValueView) -> str:
    """Dtype and shape as a label shows them, such as `bf16 [batch, sequence, 4096]`."""
    if value.shape is None:
        return ""
    sizes = ", ".join(size if len(size) <= LONGEST_SIZE else "…" for size in value.shape)
    return f"{SHORT_TYPES.get(value.dtype, value.dtype)} [{sizes}]"


def short_name(name: str, limit: int = 44) -> str:
    """`name` with its middle left out where it is longer than `limit` characters."""
    if len(name) <= limit:
        return name
    head = limit // 3
    return f"{name[:head]}…{name[-(limit - head - 1) :]}"


def _new(title: str) -> graphviz.Digraph:
    return graphviz.Digraph(
        "fxcalib",
        graph_attr={
            "fontname": FONT,
            "fontsize": "16",
            "fontcolor": INK,
            "label": f"<{title}>",
            "labelloc": "t",
            "rankdir": "TB",
            "nodesep": "0.25",
            "ranksep": "0.34",
            "pad": "0.3",
            "bgcolor": "white",
            "newrank": "true",  # else edges between clusters are only wishes to dot
        },
        node_attr={"fontname": FONT, "fontsize": "11", "fontcolor": INK, "shape": "box", "style": "filled,rounded"},
        edge_attr={"fontname": FONT, "fontsize": "9", "fontcolor": MUTED, "color": "#8895a2", "arrowsize": "0.6"},
    )


def _graph(drawing: Drawing, view: GraphView) -> graphviz.Digraph:
    counted = f"{number(view.parameters)} parameters, {format_bytes(view.bytes)}, {len(view.subgraphs)} subgraphs"
    shown = " ".join(size for edge in view.edges for size in edge.value.shape or ())
    sizes = ", ".join(f"{name} {size}" for name, size in view.sizes.items() if name in shown)
    dot = _new(
        f"<b>{_text(view.model)}</b><br/><font point-size='11' color='{MUTED}'>{_text(view.type)} · {counted}"
        f"<br/>bytes at {_text(sizes)}</font>"
    )
    inputs = [box for box in drawing.boxes if box.nodes[0].kind == "input"]
    for box in inputs:
        _box(dot, box)
    for stretch in drawing.stretches:
        _stretch(dot, stretch, drawing)
    for box in drawing.boxes:
        if box.cluster is None and box not in inputs:
            _box(dot, box)
    for arrow in drawing.arrows:
        _arrow(dot, arrow)
    for above, below in drawing.order():
        dot.edge(_id(above), _id(below), style="invis", weight="1")
    return dot


def _stretch(dot: graphviz.Digraph, stretch: Stretch, drawing: Drawing) -> None:
    if stretch.period == 1:
        _cluster(dot, drawing.subgraphs[stretch.start], drawing, stretch)
        return
    with dot.subgraph(name=f"cluster_stretch_{stretch.start}") as outer:
        title = (
            f"<b>subgraphs {stretch.start} … {stretch.stop - 1}: these {stretch.period}, {TIMES} {stretch.repeats}</b>"
        )
        title += "<br align='left'/>" + _passed_on(drawing, stretch)
        outer.attr(label=f"<{title}>", labeljust="l", style="rounded,dashed", color=CROSSING, fontcolor=CROSSING)
        outer.attr(fontsize="14", margin="14", penwidth="1.6")
        outer.attr(**{"class": "stretch"})
        for index in range(stretch.start, stretch.start + stretch.period):
            _cluster(outer, drawing.subgraphs[index], drawing, None)


def _cluster(dot: graphviz.Digraph, part: SubgraphView, drawing: Drawing, stretch: Stretch | None) -> None:
    folded = stretch is not None and stretch.repeats > 1
    with dot.subgraph(name=f"cluster_{part.index}") as cluster:
        cluster.attr(
            label=f"<{_title(part, stretch if folded else None, drawing)}>",
            labeljust="l",
            style="filled,rounded",
            fillcolor=CLUSTER,
            color=CROSSING if folded else CLUSTER_EDGE,
            penwidth="2" if folded else "1",
            margin="12",
            id=f"subgraph-{part.index}",
            tooltip=f"subgraph {part.index}",
            **{"class": "subgraph folded" if folded else "subgraph"},
        )
        for tag in drawing.tags:
            if tag.cluster == part.index:
                _tag(cluster, tag)
        for box in drawing.boxes:
            if box.cluster == part.index:
                _box(cluster, box)


def _title(part: SubgraphView, stretch: Stretch | None, drawing: Drawing) -> str:
    small = f"<font point-size='10' color='{MUTED}'>"
    held = f"{number(part.parameters)} parameters · {format_bytes(part.bytes)}"
    if stretch is None:
        return f"<b>subgraph {part.index}</b>{SPACE * 2}{small}{held}</font>"
    return (
        f"<b>subgraphs {stretch.start} … {stretch.stop - 1}</b>{SPACE * 3}"
        f"<font color='{CROSSING}'><b>{TIMES} {stretch.repeats}</b></font><br align='left'/>"
        f"{small}{held} each</font><br align='left'/>{_passed_on(drawing, stretch)}"
    )


def _passed_on(drawing: Drawing, stretch: Stretch) -> str:
    """What one repetition of a stretch hands to the next."""
    inside = range(stretch.start, stretch.start + stretch.period)
    own = {box.id for box in drawing.boxes if box.cluster in inside}
    values = {str(v): v for a in drawing.arrows if a.loops and a.target in own for v in a.values if v.shape is not None}
    lines = [f"to the next: {_text(shape_text(v))}{ROOM}<b>{format_bytes(v.bytes or 0)}</b>" for v in values.values()]
    return "".join(f"<font point-size='10' color='{CROSSING}'>{line}</font><br align='left'/>" for line in lines)


def _box(dot: graphviz.Digraph, box: Box) -> None:
    node = box.nodes[0]
    if node.kind in ("target", "module"):
        _module(dot, node)
    elif node.kind == "glue":
        lines = [_text(n.name.removeprefix("aten.")) for n in box.nodes]
        if len(lines) > CHAIN_LINES:
            rest = len(lines) - CHAIN_LINES + 1
            lines = [*lines[: CHAIN_LINES - 2], f"… {rest} more", lines[-1]]
        dot.node(
            _id(node.id),
            label=f"<{'<br/>'.join(lines)}>",
            fontsize="8.5",
            fontcolor=MUTED,
            fillcolor=GLUE,
            color=GLUE_EDGE,
            margin="0.06,0.03",
            height="0.2",
            width="0.3",
            tooltip="\n".join(n.source for n in box.nodes) or " ",
            **{"class": "glue"},
        )
    elif node.kind == "weight":
        label = f"<{_text(short_name(node.name))}<br/>{format_bytes(node.bytes)}>"
        dot.node(_id(node.id), label=label, fontsize="9", fillcolor=MODULE, color=MODULE_EDGE, **{"class": "module"})
    else:
        lines = [f"<b>{_text(short_name(node.name))}</b>"]
        if node.kind == "input" and node.value.shape is not None:
            lines.append(f"<font point-size='9'>{_text(shape_text(node.value))}</font>")
        dot.node(
            _id(node.id),
            label=f"<{'<br/>'.join(lines)}>",
            shape="box",
            fillcolor=INPUT,
            color=INPUT_EDGE,
            **{"class": "input"},
        )


def _module(dot: graphviz.Digraph, node: NodeView) -> None:
    target = node.kind == "target"
    held = f"{number(node.parameters)} parameters · {format_bytes(node.bytes)}" if node.bytes else "no parameters"
    size = "12" if target else "10"
    label = (
        f"<b>{_text(short_name(node.name))}</b><br/>{_text(node.type)}<br/><font point-size='9'>{held}</font>"
        if target
        else f"{_text(short_name(node.name))}<br/><font point-size='9'>{_text(node.type)} · {held}</font>"
    )
    dot.node(
        _id(node.id),
        label=f"<{label}>",
        fontsize=size,
        fillcolor=TARGET if target else MODULE,
        color=TARGET_EDGE if target else MODULE_EDGE,
        penwidth="1.6" if target else "1",
        margin="0.16,0.09" if target else "0.1,0.05",
        tooltip=f"{node.name} ({node.type})",
        **{"class": "target" if target else "module"},
    )


def _tag(dot: graphviz.Digraph, tag: Tag) -> None:
    dot.node(
        _id(tag.id),
        label=f"<{_text(short_name(tag.value.name, 28))}<br/>{_text(shape_text(tag.value))}>",
        shape="cds",
        style="filled",
        fontsize="9",
        fontcolor=CROSSING,
        fillcolor="#fff4ec",
        color=CROSSING,
        margin="0.18,0.04",
        **{"class": "tag"},
    )


def _arrow(dot: graphviz.Digraph, arrow: Arrow) -> None:
    label = _arrow_label(arrow)
    attributes = {"label": f"<{label}>"} if label else {}
    if arrow.crosses:
        heavy = any(value.bytes != 0 for value in arrow.values)
        attributes |= {"color": CROSSING, "fontcolor": CROSSING, "penwidth": "2.2" if heavy else "0.8"}
        attributes |= {"class": "crossing", "weight": "4" if heavy else "1"}
    if arrow.loops:
        attributes |= {"style": "dashed", "penwidth": "1.6", "constraint": "false", "class": "crossing loop"}
    dot.edge(_id(arrow.source), _id(arrow.target), **attributes)


def _arrow_label(arrow: Arrow) -> str:
    lines = []
    if not arrow.loops and not arrow.source.startswith("tag:"):
        for value in arrow.values:
            held = f"<b>{format_bytes(value.bytes)}</b>" if arrow.crosses and value.bytes else ""
            lines += [part for part in (_text(shape_text(value)), held) if part]
    if arrow.share:
        lines.append(f"<i>{arrow.share}</i>")
    return "<br align='left'/>".join(f"{SPACE * 2}{line}" for line in lines) + ("<br align='left'/>" if lines else "")


def _tree(view: TreeView) -> graphviz.Digraph:
    reason = "<br align='left'/>".join(_wrapped(view.error, 110))
    dot = _new(
        f"<b>{_text(view.model)}</b> ({_text(view.type)}) cannot be traced<br/>"
        f"<font point-size='11' color='{FAILING_EDGE}'>{reason}<br align='left'/></font>"
    )
    dot.attr(rankdir="LR", ranksep="0.5", nodesep="0.12")
    parents: list[TreeNode] = []
    for node in view.nodes:
        parents = parents[: node.depth]
        _tree_node(dot, node, view.source)
        if parents:
            dot.edge(_id(parents[-1].name or "."), _id(node.name))
        parents.append(node)
    return dot


def _tree_node(dot: graphviz.Digraph, node: TreeNode, source: str) -> None:
    name = short_name(node.name.rpartition(".")[2] if node.depth > 1 else node.name) or node.type
    times = f" <font color='{CROSSING}'><b>{TIMES} {node.count}</b></font>" if node.count > 1 else ""
    held = f"{number(node.parameters)} parameters · {format_bytes(node.bytes)}" if node.bytes else "no parameters"
    lines = [f"<b>{_text(name)}</b>{times}", f"<font point-size='9'>{_text(node.type)} · {held}</font>"]
    if node.failing:
        stops = "<br/>".join(_wrapped(source, 70))
        lines.append(f"<font point-size='9' color='{FAILING_EDGE}'><b>stops here</b><br/>{stops}</font>")
    fill, edge = (TARGET, TARGET_EDGE) if node.target else (MODULE, MODULE_EDGE)
    if node.failing:
        fill, edge = FAILING, FAILING_EDGE
    dot.node(
        _id(node.name or "."),
        label=f"<{'<br/>'.join(lines)}>",
        fillcolor=fill,
        color=edge,
        fontsize="10",
        penwidth="2.4" if node.failing else "1",
        margin="0.1,0.05",
        **{"class": "failing" if node.failing else "target" if node.target else "module"},
    )


def _wrapped(text: str, width: int) -> Sequence[str]:
    lines = []
    for line in text.splitlines():
        while len(line) > width:
            cut = line.rfind(" ", width // 2, width)
            cut = cut if cut > 0 else width
            lines.append(line[:cut])
            line = line[cut:].lstrip()
        lines.append(line)
    return [_text(line) for line in lines]


def _text(text: str) -> str:
    """`text` inside of an HTML-like label."""
    return html.escape("".join(c for c in text if c.isprintable()), quote=True)


def _id(identity: str) -> str:
    # a colon in a node's name would be read as a port
    return identity.replace(":", "/")
