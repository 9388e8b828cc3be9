"""The direction of imports, which the layout stands on, and the exported names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import fxcalib

PACKAGE = Path(fxcalib.__file__).parent

MAY_IMPORT = {
    "errors": set(),
    "patterns": {"errors"},
    "progress": {"modifiers"},
    "report": {"modifiers"},
    "memory": set(),
    "profiling": set(),
    "math": {"math", "errors"},
    "mappings": {"mappings", "tracing", "errors", "patterns"},
    "modifiers": {"mappings", "modifiers", "math", "errors", "patterns", "profiling"},
    "tracing": {"tracing", "errors", "patterns"},
    "partitioning": {"partitioning", "tracing", "errors"},
    "planning": {"modifiers", "errors"},
    "transfers": set(),
    "intermediates": {"errors", "transfers"},
    "weights": set(),
    "finiteness": {"math", "errors", "transfers"},
    "programs": {"errors", "partitioning", "planning", "tracing"},
    "executor": {
        "finiteness",
        "intermediates",
        "modifiers",
        "planning",
        "profiling",
        "programs",
        "progress",
        "report",
        "weights",
    },
    "experts": set(),
    "recipes": {"recipes", "errors", "modifiers"},
    "chat": {"errors"},
    "multimodal": {"chat", "errors"},
    "sources": {"chat", "embedded", "errors"},
    "forward_state": {"programs", "tracing"},
    "checkpoint": {"errors", "experts", "loading", "report"},
    "loading": {"math", "errors"},
}
"""Modules and packages of fxcalib -> what they may import of it. What is not listed composes these."""


def imports_of(path: Path) -> set[str]:
    return imports_among(ast.walk(ast.parse(path.read_text())))


def imports_among(nodes: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(name: str) -> list[Path]:
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_direction(name: str) -> None:
    parts = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir()}
    for path in files_of(name):
        own = {i.split(".")[1] for i in imports_of(path) if i.startswith("fxcalib.")} & parts
        assert own <= MAY_IMPORT[name], f"{path.relative_to(PACKAGE)} imports {own - MAY_IMPORT[name]}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("networkx", {"partitioning"}),
        ("torch._", {"tracing"}),
        ("torch.fx.experimental", {"tracing"}),
        ("typer", {"cli"}),
        ("datasets", {"sources"}),
        ("triton", {"math"}),
    ],
)
def test_libraries_stay_where_they_belong(library: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for path in PACKAGE.rglob("*.py")
        if any(i == library or i.startswith(f"{library}." if library[-1] != "_" else library) for i in imports_of(path))
    }
    assert users <= allowed


def test_private_torch_is_pinned_in_one_module() -> None:
    for path in PACKAGE.rglob("*.py"):
        private = {i for i in imports_of(path) if i.startswith(("torch._", "torch.fx.experimental"))}
        assert not private or path.name == "torch_private.py", f"{path} imports {private}"


def test_triton_is_imported_by_its_kernels_and_they_by_their_launchers_when_called() -> None:
    for path in PACKAGE.rglob("*.py"):
        users = {i for i in imports_of(path) if i == "triton" or i.startswith("triton.")}
        assert not users or path.name == "triton_kernels.py", f"{path} imports {users}"
        assert "fxcalib.math.triton_kernels" not in imports_among(ast.parse(path.read_text()).body), path
    code = (
        "import sys, torch; from fxcalib.math.grids import Grid, ScaleFormat; from fxcalib.math import gptq, qparams;"
        "qparams.mse_qparams(torch.ones(2, 8), Grid('int', 4), ScaleFormat()); print('triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_only_the_executor_loops_over_batches() -> None:
    loops = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.For) and ast.unparse(node.iter).rstrip(")").split("(")[-1] in (
                "batches",
                "dataloader",
                "self._batches.facts",
            ):
                loops.append(path.name)
    assert set(loops) <= {"executor.py", "batch_checks.py"}


def test_exported_names() -> None:
    assert sorted(fxcalib.__all__) == dir(fxcalib)
    assert all(getattr(fxcalib, name) is not None for name in fxcalib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = fxcalib.quantise


def test_importing_fxcalib_imports_neither_torch_nor_transformers() -> None:
    code = "import fxcalib, sys; print(sorted({'torch', 'transformers', 'networkx'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
