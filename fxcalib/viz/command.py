"""`fxcalib graph`: from a model's name to the picture in a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from fxcalib.arguments import DEFAULT_SAMPLES
from fxcalib.errors import BatchError, DataError, OptionError
from fxcalib.loading import load_skeleton
from fxcalib.partitioning import partition
from fxcalib.report import Report
from fxcalib.tracing import TraceError, trace
from fxcalib.viz.describe import describe
from fxcalib.viz.files import check_output, save
from fxcalib.viz.memory import predict_memory
from fxcalib.viz.sample import sample_batch
from fxcalib.viz.tree import describe_failure

SHOW_MEMORY = (".html", ".json")
"""Files that hold more than the picture."""


def draw(
    model: str,
    output: Path,
    *,
    targets: list[str] | None = None,
    targets_per_subgraph: int = 1,
    batch_file: Path | None = None,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    batch_size: int = 1,
    report: Path | None = None,
    expand: bool = False,
    trust_remote_code: bool = False,
) -> str | None:
    """Draw `model` into `output`. Returns None, or why it cannot be traced: then `output` shows its module tree.

    Raises:
        FxcalibError: the model, an option or a file is wrong; nothing is written.
    """
    check_output(output)
    measured = None if report is None else read_report(report)
    skeleton = load_skeleton(model, trust_remote_code=trust_remote_code)
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model
    if batch_file is not None:
        batch = read_batch(batch_file)
    else:
        batch = sample_batch(skeleton, batch=batch_size, sequence=seq_len)
    try:
        parts = partition(trace(skeleton, batch, targets), targets_per_subgraph)
    except TraceError as error:
        save(describe_failure(skeleton, error, targets, name=name), output)
        return str(error)
    memory = None
    if output.suffix.lower() in SHOW_MEMORY:
        memory = predict_memory(parts, batch, samples=samples, per_subgraph=targets_per_subgraph)
    save(describe(parts, measured, name=name, memory=memory), output, expand=expand)
    return None


def read_batch(path: Path) -> dict[str, Any]:
    """Keyword arguments of a model, as `torch.save` wrote them; no code in the file is run.

    Raises:
        BatchError: there is no such file, or it holds something else.
    """
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BatchError(
            f"batch file {str(path)!r} cannot be read: {reason}; save a dict of tensors with torch.save"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        kind = type(held).__name__
        raise BatchError(f"batch file {str(path)!r} holds a {kind}, not a dict of the model's keyword arguments")
    return held


def read_report(path: Path) -> Report:
    """The report of a run.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    if path.is_dir():
        raise OptionError(f"report {str(path)!r} is a folder; give the fxcalib_report.json in it")
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except OSError as error:
        raise DataError(f"report {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{str(path)!r} is no report of fxcalib: {type(error).__name__} {error}") from error
