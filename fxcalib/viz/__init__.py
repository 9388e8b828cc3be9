"""Pictures of a partitioned model: a description as plain data first, then DOT, SVG, PNG, PDF or one HTML page."""

from __future__ import annotations

from fxcalib.viz.describe import describe
from fxcalib.viz.dot import to_dot, tree_to_dot
from fxcalib.viz.files import FORMATS, check_output, save
from fxcalib.viz.memory import predict_memory
from fxcalib.viz.page import to_html
from fxcalib.viz.rendering import render
from fxcalib.viz.sample import sample_batch
from fxcalib.viz.tree import describe_failure
from fxcalib.viz.view import GraphView, TreeView

__all__ = [
    "FORMATS",
    "GraphView",
    "TreeView",
    "check_output",
    "describe",
    "describe_failure",
    "predict_memory",
    "render",
    "sample_batch",
    "save",
    "to_dot",
    "to_html",
    "tree_to_dot",
]
