"""Tracing: a model and a sample batch become a graph with the sequential targets as opaque nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxcalib.errors import BatchError
from fxcalib.tracing.errors import GuardError, TraceError
from fxcalib.tracing.guards import Guard
from fxcalib.tracing.structure import flatten
from fxcalib.tracing.targets import Targets, default_targets, resolve_targets
from fxcalib.tracing.traced import BoundBatch, TracedModel
from fxcalib.tracing.tracer import Recorder

__all__ = [
    "BoundBatch",
    "Guard",
    "GuardError",
    "Targets",
    "TraceError",
    "TracedModel",
    "default_targets",
    "resolve_targets",
    "trace",
]


def trace(
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
    *,
    ignore: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> TracedModel:
    """Trace `model(**batch)` into a graph whose opaque nodes are the sequential targets and all modules beside them.

    The model's own forward runs once on fake tensors with symbolic sizes: no weight is read or moved, so a model on the
    meta device is traced as well. One graph then serves batches of other sizes, lengths and paddings, as far as its
    guards hold.

    Args:
        model: any module. It is left as it was, whether tracing succeeds or not.
        batch: keyword arguments of `model`, such as `input_ids` (batch, sequence) int64. Values are looked at only
            where the model branches on them.
        targets: class names, module names or `re:` patterns; default: the model's `_no_split_modules` that occur in it,
            else the class of its largest repeated layer stack.
        ignore: modules to keep whole although targets lie in them, in the same notation.
        device: where the graph is to be run; default: where the batch lies (the CPU for a meta batch).

    Raises:
        TargetError: a target matches nothing.
        TraceError: the forward cannot be recorded; the message carries the model's source line.
    """
    started = time.perf_counter()
    tensors = [leaf for leaf in flatten(dict(batch))[0] if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise BatchError("cannot trace: the batch holds no tensor; pass the keyword arguments of the model's forward")
    where = torch.device(device) if device is not None else tensors[0].device
    if where.type == "meta":
        where = torch.device("cpu")
    resolved = resolve_targets(model, targets, ignore)
    recording = Recorder(model, resolved, where).record(batch, dynamic=lambda name, dim: True)
    return TracedModel(model, resolved, recording, where, time.perf_counter() - started)
