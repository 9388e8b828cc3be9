"""Why a model could not be traced, or a batch not be replayed."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch.fx.proxy import TraceError as FxTraceError

from fxcalib.errors import FxcalibError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_STDLIB = sysconfig.get_paths()["stdlib"]


class TraceError(FxcalibError, FxTraceError):
    """The model's forward did something that cannot be recorded; the message carries the model's source line."""


class GuardError(TraceError):
    """A batch breaks an assumption that the trace has baked in. Callers trace again with that batch."""


def is_model_code(filename: str) -> bool:
    """Whether a source file belongs to the model: not to torch, this package or the interpreter itself."""
    if filename.startswith("<") or filename.startswith((_TORCH, _HERE)):
        return False
    return not (filename.startswith(_STDLIB) and "site-packages" not in filename)


def source_of_error(error: BaseException) -> str:
    """`file:line in function: text` of the innermost line of the model that led to `error`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_model_code(frame.filename):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
    return "no line of the model"


def source_of_frame(frame: FrameType | None) -> str:
    """`file:line: text` of the innermost line of the model on the stack that starts at `frame`."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_model_code(filename):
            return f"{filename}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "no line of the model"
