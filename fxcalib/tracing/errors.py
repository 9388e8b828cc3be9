"""Why a model could not be traced, or a batch not be replayed."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.fx.proxy import TraceError as FxTraceError

from fxcalib.errors import FxcalibError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_STDLIB = sysconfig.get_paths()["stdlib"]


@dataclass(frozen=True)
class Location:
    """A line of the model that was running, in the method of one of its modules or in a function."""

    file: str
    line: int
    function: str
    """Name of the function, without its class or module."""
    text: str
    """The line itself, without indentation."""
    module: str = ""
    """Qualified name of the submodule whose method it is; empty for functions and for the model's own methods."""
    importable: str | None = None
    """Where the function can be imported from, as `package.module:Class.name`; None for local functions."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.text}"


class TraceError(FxcalibError, FxTraceError):
    """The model's forward did something that cannot be recorded; the message carries the model's source line."""

    def __init__(
        self,
        message: str,
        *,
        kind: str = "operation that cannot be recorded",
        calls: tuple[Location, ...] = (),
        values: tuple[str, ...] = (),
    ) -> None:
        """Say `message`; the rest is for `fxcalib.explain`."""
        super().__init__(message)
        self.kind = kind
        """What sort of problem it is, such as `data-dependent branch`."""
        self.calls = calls
        """The lines of the model that were running, from the outermost to the one that failed."""
        self.values = values
        """Tensors of the failing line as `name: dtype[symbolic sizes]`."""

    @property
    def location(self) -> Location | None:
        """The line of the model that cannot be traced, where there is one."""
        return self.calls[-1] if self.calls else None


class GuardError(TraceError):
    """A batch breaks an assumption that the trace has baked in. Callers trace again with that batch."""


def is_model_code(filename: str) -> bool:
    """Whether a source file belongs to the model: not to torch, numpy, this package or the interpreter itself."""
    if filename.startswith("<") or filename.startswith((_TORCH, _HERE)) or "/site-packages/numpy/" in filename:
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
