"""The memory of a calibration's steps, for the page: what `fxcalib plan` predicts for the default algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxcalib.arguments import DatasetArguments
from fxcalib.errors import FxcalibError, OptionError
from fxcalib.modifiers import GPTQModifier
from fxcalib.partitioning import Partition
from fxcalib.pipelines import SequentialPipeline
from fxcalib.prediction import Calibration, DryRun, predict
from fxcalib.viz.view import MemoryView, StepView

SCHEME = "W4A16"
GROUPS = (128, 64, 32, 16, 8, 4, 2, 1)
"""The default group size, and smaller ones where it does not divide a width."""


def predict_memory(
    partition: Partition, batch: Mapping[str, Any], *, samples: int, per_subgraph: int = 1, device: str | None = None
) -> MemoryView:
    """What each step of a calibration with `samples` samples like those of `batch` holds.

    Args:
        partition: of any model, also one on the meta device; its model is traced again, as `fxcalib plan` does.
        batch: that it was traced with.
        samples: how many there are in all.
        per_subgraph: targets in each subgraph, as the partition has them.
        device: that computes; default: the accelerator if there is one.
    """
    traced = partition.traced
    arguments = DatasetArguments(
        sequential_targets=traced.targets.patterns,
        sequential_targets_per_subgraph=per_subgraph,
        tracing_ignore=traced.targets.ignore,
        device=device,
    )
    shapes = [value.shape for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
    rows, length = (shapes[0][0], shapes[0][-1]) if shapes else (1, 1)
    sizes = Calibration(samples=max(samples, rows), batch_size=rows, seq_len=length)
    refused = ""
    for group in GROUPS:
        flow = SequentialPipeline(GPTQModifier(scheme=SCHEME, group_size=group))
        try:
            run = predict(traced.model, "", flow, sizes, arguments, writes=False, batch=batch)
        except OptionError as error:
            refused = str(error)
        except FxcalibError as error:
            return MemoryView(f"The memory of the steps was not predicted: {error}", ())
        else:
            return _view(run, f"{SCHEME} in groups of {group}")
    return MemoryView(f"The memory of the steps was not predicted: {refused}", ())


def _view(run: DryRun, scheme: str) -> MemoryView:
    tier = "host" if run.device == "cpu" else "device"
    steps = []
    for moment in run.moments:
        if moment.step is not None:
            step = run.plan.steps[moment.step]
            parts = moment.host if tier == "host" else moment.device
            steps.append(StepView(str(step), step.kind, step.subgraph, dict(parts)))
    title = f"Predicted {tier} memory of each step of GPTQ to {scheme} on {run.device}, {run.samples} samples"
    return MemoryView(title, tuple(steps))
