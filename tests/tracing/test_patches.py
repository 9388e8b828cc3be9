"""Every patch is needed: without it, with the installed transformers, a trace goes another way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from batches import token_batch
from tiny_llama import tiny_llama
from torch import fx

import tracing_patches
from fxcalib import trace


def masks(graph: fx.Graph) -> int:
    return sum(n.op == "call_module" and n.kwargs.get("attention_mask") is not None for n in graph.nodes)


def test_without_fake_tensors_as_data_an_unpadded_batch_carries_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = token_batch(2, 8, use_cache=False)
    assert masks(trace(tiny_llama(), batch).graph) == 0
    others = tuple(p for p in tracing_patches.PATCHES if p is not tracing_patches.fake_tensors_are_data)
    monkeypatch.setattr(tracing_patches, "PATCHES", others)
    assert masks(trace(tiny_llama(), batch).graph) == 2, "transformers no longer needs this patch: remove it"


def test_every_patch_says_why_and_until_when() -> None:
    files = [path for path in Path(tracing_patches.__file__).parent.glob("*.py") if path.name != "__init__.py"]
    assert len(files) == len(tracing_patches.PATCHES)
    for path in files:
        explained = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "Why:" in explained, path
        assert "When it can go:" in explained, path
