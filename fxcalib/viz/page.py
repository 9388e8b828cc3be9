"""One self-contained HTML page: the picture with pan, zoom and search, tables of the subgraphs, memory and a run."""

from __future__ import annotations

import html
import json
import re
from importlib import resources

from fxcalib.viz.folding import stretches, unfolded
from fxcalib.viz.view import GraphView, TreeView


def to_html(view: GraphView | TreeView, svg: str, *, expand: bool = False) -> str:
    """The page for `view` around its picture. Nothing in it is loaded from anywhere else."""
    data = view.to_dict()
    if isinstance(view, GraphView):
        same = [subgraph.same_as for subgraph in view.subgraphs]
        chosen = unfolded(len(same)) if expand else stretches(same)
        data["stretches"] = [[s.start, s.period, s.repeats] for s in chosen]
    parts = {
        "TITLE": html.escape(f"{view.model} · fxcalib"),
        "STYLE": _asset("page.css"),
        "PICTURE": picture_of(svg),
        "DATA": embedded_json(data),
        "SCRIPT": _asset("page.js"),
    }
    # one pass, so that nothing that came from the model is looked at for placeholders
    return re.sub(r"%\{([A-Z]+)\}", lambda found: parts[found[1]], _asset("page.html"))


def picture_of(svg: str) -> str:
    """The `<svg>` element of a file that Graphviz wrote."""
    return svg[svg.index("<svg") :].strip()


def embedded_json(data: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
