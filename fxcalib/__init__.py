"""fxcalib: a graph compiler for post-training calibration and quantization.

`trace` turns a model into a graph, `partition` cuts it at its sequential targets, `calibrate` takes data through the
subgraphs and compresses them one after another, `quantize` does all of it from a checkpoint to a checkpoint, and `plan`
says beforehand what that would take.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcalib.api import calibrate, plan, quantize
    from fxcalib.arguments import DatasetArguments
    from fxcalib.evaluation import Evaluation, evaluate
    from fxcalib.explanation import Explanation, explain
    from fxcalib.modifiers import GPTQModifier, Modifier, QuantizationModifier
    from fxcalib.partitioning import Partition, Subgraph, partition
    from fxcalib.report import Report
    from fxcalib.tracing import TracedModel, TraceError, trace
    from fxcalib.tracing.patching import wrap, wrapped

_HOME = {
    "calibrate": "fxcalib.api",
    "plan": "fxcalib.api",
    "quantize": "fxcalib.api",
    "DatasetArguments": "fxcalib.arguments",
    "Evaluation": "fxcalib.evaluation",
    "evaluate": "fxcalib.evaluation",
    "Explanation": "fxcalib.explanation",
    "explain": "fxcalib.explanation",
    "GPTQModifier": "fxcalib.modifiers",
    "Modifier": "fxcalib.modifiers",
    "QuantizationModifier": "fxcalib.modifiers",
    "Partition": "fxcalib.partitioning",
    "Subgraph": "fxcalib.partitioning",
    "partition": "fxcalib.partitioning",
    "Report": "fxcalib.report",
    "TraceError": "fxcalib.tracing",
    "TracedModel": "fxcalib.tracing",
    "trace": "fxcalib.tracing",
    "wrap": "fxcalib.tracing.patching",
    "wrapped": "fxcalib.tracing.patching",
}

__all__ = [
    "DatasetArguments",
    "Evaluation",
    "Explanation",
    "GPTQModifier",
    "Modifier",
    "Partition",
    "QuantizationModifier",
    "Report",
    "Subgraph",
    "TraceError",
    "TracedModel",
    "calibrate",
    "evaluate",
    "explain",
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
