"""A view to a file, whose ending says what it is to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from fxcalib.errors import OptionError, OutputError, nearest
from fxcalib.viz.dot import to_dot, tree_to_dot
from fxcalib.viz.page import to_html
from fxcalib.viz.rendering import Picture, render
from fxcalib.viz.view import GraphView, TreeView

FORMATS = ("svg", "png", "pdf", "dot", "json", "html")


def check_output(path: Path) -> str:
    """The format that the ending of `path` names, after a look at whether the file can be written.

    Raises:
        OptionError: the ending is none of `FORMATS`.
        OutputError: the folder does not exist or cannot be written, or `path` is a folder.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        said = f"{str(path)!r} ends in .{ending}" if ending else f"{str(path)!r} has no ending"
        raise OptionError(f"{said}, which is no kind of picture: {nearest(ending, FORMATS)}")
    if path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: its folder {str(path.parent)!r} does not exist; make it")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{str(path)!r} cannot be written: no permission in {str(path.parent)!r}")
    return ending


def save(view: GraphView | TreeView, path: str | Path, *, expand: bool = False) -> Path:
    """Write `view` to `path`; its ending chooses among `FORMATS`. The file appears whole or not at all.

    Raises:
        OptionError: an unknown ending.
        OutputError: the file cannot be written.
        RendererError: a picture is asked for and nothing that draws it is installed.
    """
    path = Path(path)
    content = _content(view, check_output(path), expand)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror}; choose another place") from error
    return path


def _content(view: GraphView | TreeView, ending: str, expand: bool) -> bytes:
    if ending == "json":
        return view.to_json().encode()
    dot = tree_to_dot(view) if isinstance(view, TreeView) else to_dot(view, expand=expand)
    if ending == "dot":
        return dot.encode()
    if ending == "html":
        return to_html(view, render(dot, "svg").decode(), expand=expand).encode()
    return render(dot, cast(Picture, ending))
