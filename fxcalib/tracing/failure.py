"""What is known of a forward that could not be recorded: the lines that ran, the values, the kind of problem."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from fxcalib.tracing.errors import Location, TraceError, is_model_code, source_of_error
from fxcalib.tracing.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)

NEXT_STEPS = (
    "  If the model itself runs on this batch, fxcalib.explain(model, batch) says more. Wrap the function that holds "
    "this line with fxcalib.wrap,\n  or calibrate without a trace: pipeline='layer_sequential', suspended=True "
    "(fxcalib quantize --pipeline layer_sequential --suspended)"
)

DATA_DEPENDENT_BRANCH = "data-dependent branch"
DATA_DEPENDENT_SIZE = "data-dependent size"
LEAVES_TORCH = "data that leaves torch"
RAISED = "error in the model's own code"


def trace_error(
    model: nn.Module, error: Exception, names: Mapping[int, str], readable: Callable[[Any], object]
) -> TraceError:
    """`error`, which rose in the forward of `model`, as a TraceError with all that is known.

    Args:
        model: whose forward it is.
        error: what it raised.
        names: id of each submodule -> its qualified name.
        readable: a symbolic size in the names of the inputs.
    """
    frames = _frames(error)
    calls = tuple(_location(frame, line, names) for frame, line in frames)
    values = _values(*frames[-1], readable) if frames else ()
    if isinstance(error, TraceError):
        text = str(error)
        if "cannot be traced" not in text:
            first, _, rest = text.partition("\n")
            text = f"{type(model).__name__} cannot be traced: {first}\n  at {source_of_error(error)}"
            text = "\n".join([text, *([rest] if rest else []), NEXT_STEPS])
        return TraceError(text, kind=error.kind, calls=calls, values=values)
    reason = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason}\n  at {source_of_error(error)}"
    return TraceError(f"{text}\n{NEXT_STEPS}", kind=_kind(error), calls=calls, values=values)


def _kind(error: Exception) -> str:
    if isinstance(error, DataDependentOutputException):
        return DATA_DEPENDENT_BRANCH
    if isinstance(error, (GuardOnDataDependentSymNode, DynamicOutputShapeException)):
        return DATA_DEPENDENT_SIZE
    if isinstance(error, UnsupportedOperatorException):
        return "unsupported operation"
    if re.search(r"numpy|tensor subclasses|data pointer|data_ptr", str(error)):
        return LEAVES_TORCH
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    inner = "" if traceback is None else traceback.tb_frame.f_code.co_filename
    return RAISED if is_model_code(inner) else "operation that cannot be recorded"


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    found = []
    traceback = error.__traceback__
    while traceback is not None:
        if is_model_code(traceback.tb_frame.f_code.co_filename):
            found.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found


def _location(frame: FrameType, line: int, names: Mapping[int, str]) -> Location:
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return Location(
        file=code.co_filename,
        line=line,
        function=code.co_name,
        text=linecache.getline(code.co_filename, line, frame.f_globals).strip(),
        module=names.get(id(owner), "") if isinstance(owner, nn.Module) else "",
        importable=_importable(str(frame.f_globals.get("__name__")), code),
    )


def location_of(frame: FrameType | None, names: Mapping[int, str]) -> Location | None:
    """The innermost line of the model on the stack that starts at `frame`; `names` as for `trace_error`."""
    while frame is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else _location(frame, frame.f_lineno, names)


def _importable(module: str, code: CodeType) -> str | None:
    """Where the function with this code can be imported from."""
    held = vars(sys.modules[module]) if module in sys.modules else {}
    for name, value in list(held.items()):
        if _runs(value, code):
            return f"{module}:{name}"
        if inspect.isclass(value) and value.__module__ == module:
            for method, inner in vars(value).items():
                if _runs(getattr(inner, "__func__", inner), code):
                    return f"{module}:{name}.{method}"
    return None


def _runs(value: object, code: CodeType) -> bool:
    return isinstance(value, FunctionType) and inspect.unwrap(value).__code__ is code


def _values(frame: FrameType, line: int, readable: Callable[[Any], object]) -> tuple[str, ...]:
    """The tensors and symbolic numbers that the line names."""
    text = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
    found = []
    for name in dict.fromkeys(re.findall(r"(?<![.\w])[A-Za-z_]\w*", text)):
        value = frame.f_locals.get(name)
        if isinstance(value, torch.Tensor):
            found.append(f"{name}: {described(value, readable)}")
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found.append(f"{name}: a number that depends on sizes or data, {readable(value)}")
    return tuple(found)


def described(tensor: torch.Tensor, readable: Callable[[Any], object]) -> str:
    """`dtype[sizes]`, with `[]` for a number."""
    sizes = ", ".join(str(readable(size)) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')}[{sizes}]"
