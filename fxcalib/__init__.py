"""fxcalib: a graph compiler for post-training calibration and quantization.

`trace` turns a model into a graph, `partition` cuts it at its sequential targets, `calibrate` takes data through the
subgraphs and compresses them one after another, `quantize` does all of it from a checkpoint to a checkpoint, and `plan`
says beforehand what that would take.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcalib.api import calibrate, quantize
    from fxcalib.arguments import DatasetArguments
    from fxcalib.evaluation import Evaluation, evaluate
    from fxcalib.explanation import Explanation, explain
    from fxcalib.mappings import AWQMapping
    from fxcalib.modifiers import (
        AWQModifier,
        GPTQModifier,
        MagnitudePruningModifier,
        Modifier,
        QuantizationModifier,
        SmoothQuantModifier,
        SparseGPTModifier,
        WandaModifier,
    )
    from fxcalib.partitioning import Partition, Subgraph, partition
    from fxcalib.recipes import Recipe, load_recipe
    from fxcalib.report import Report
    from fxcalib.run_plan import plan
    from fxcalib.tracing import TracedModel, TraceError, trace
    from fxcalib.tracing.patching import wrap, wrapped

_HOME = {
    "calibrate": "fxcalib.api",
    "plan": "fxcalib.run_plan",
    "quantize": "fxcalib.api",
    "DatasetArguments": "fxcalib.arguments",
    "Evaluation": "fxcalib.evaluation",
    "evaluate": "fxcalib.evaluation",
    "Explanation": "fxcalib.explanation",
    "explain": "fxcalib.explanation",
    "AWQMapping": "fxcalib.mappings",
    "AWQModifier": "fxcalib.modifiers",
    "GPTQModifier": "fxcalib.modifiers",
    "MagnitudePruningModifier": "fxcalib.modifiers",
    "Modifier": "fxcalib.modifiers",
    "QuantizationModifier": "fxcalib.modifiers",
    "SmoothQuantModifier": "fxcalib.modifiers",
    "SparseGPTModifier": "fxcalib.modifiers",
    "WandaModifier": "fxcalib.modifiers",
    "Partition": "fxcalib.partitioning",
    "Subgraph": "fxcalib.partitioning",
    "partition": "fxcalib.partitioning",
    "Recipe": "fxcalib.recipes",
    "load_recipe": "fxcalib.recipes",
    "Report": "fxcalib.report",
    "TraceError": "fxcalib.tracing",
    "TracedModel": "fxcalib.tracing",
    "trace": "fxcalib.tracing",
    "wrap": "fxcalib.tracing.patching",
    "wrapped": "fxcalib.tracing.patching",
}

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "DatasetArguments",
    "Evaluation",
    "Explanation",
    "GPTQModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "Partition",
    "QuantizationModifier",
    "Recipe",
    "Report",
    "SmoothQuantModifier",
    "SparseGPTModifier",
    "Subgraph",
    "TraceError",
    "TracedModel",
    "WandaModifier",
    "calibrate",
    "evaluate",
    "explain",
    "load_recipe",
    "partition",
    "plan",
    "quantize",
    "trace",
    "wrap",
    "wrapped",
]


def __getattr__(name: str) -> Any:
    # torch and transformers are imported with the first name that needs them, so that `fxcalib --help` does not wait
    if name not in _HOME:
        raise AttributeError(f"module 'fxcalib' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
