"""Tracing: a model and a sample batch become a graph with the sequential targets as opaque nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import nn

from fxcalib.errors import BatchError
from fxcalib.tracing.errors import GuardError, TraceError
from fxcalib.tracing.guards import Guard
from fxcalib.tracing.second_run import KEPT_STATE
from fxcalib.tracing.structure import flatten_batch
from fxcalib.tracing.targets import Targets, default_targets, resolve_targets
from fxcalib.tracing.traced import BoundBatch, TracedModel
from fxcalib.tracing.tracer import Recorder, Recording

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
    tensors = [leaf for leaf in flatten_batch(batch)[0] if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise BatchError("cannot trace: the batch holds no tensor; pass the keyword arguments of the model's forward")
    where = torch.device(device) if device is not None else tensors[0].device
    if where.type == "meta":
        where = torch.device("cpu")
    resolved = resolve_targets(model, targets, ignore)
    recording = _record(model, resolved, where, batch)
    return TracedModel(model, resolved, recording, where, time.perf_counter() - started)


def _record(model: nn.Module, targets: Targets, device: torch.device, batch: Mapping[str, Any]) -> Recording:
    """Record with as few assumptions as the model lets; the error is that of the first attempt."""
    first = Recorder(model, targets, device)
    try:
        return _recorded(first, batch)
    except TraceError as error:
        if error.kind == KEPT_STATE:
            raise
        leaves = flatten_batch(batch)[0]
        ones = [True, False] if any(1 in leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)) else [True]
        # some code cannot live with symbols for data: as keys of a dict, as what Python's own functions want
        data = [True, False] if first.asked_data else [True]
        for symbolic_data, symbolic_ones in list(product(data, ones))[1:]:
            recorder = Recorder(model, targets, device, symbolic_data=symbolic_data, symbolic_ones=symbolic_ones)
            with suppress(TraceError):
                return _recorded(recorder, batch)
        raise error


def _recorded(recorder: Recorder, batch: Mapping[str, Any]) -> Recording:
    recording = recorder.record(batch)
    if recorder.state.changes():
        recorder.again().check_state(batch)
    return recording
