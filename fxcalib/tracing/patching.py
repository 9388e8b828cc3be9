"""Functions that do something else while a model is traced: what `fxcalib.wrap` and `tracing_patches/` are made of.

A function is redirected by swapping its code, not its name: whoever holds it (modules that imported it by name, tables
of functions, classes, decorators around it) calls the replacement, and it stays the same object throughout.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Protocol, TypeVar

from fxcalib.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])


class Glue(Protocol):
    """What a replacement may ask of the recorder."""

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded."""

    def call_function(self, function: FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of `original(*args, **kwargs)`, recorded as one call of `function` where the code is recorded."""


Replacement = Callable[[Glue, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`replacement(glue, original, args, kwargs)` stands in for `original(*args, **kwargs)`."""


@dataclass(frozen=True)
class Patch:
    """A function, and what is called in its place while a model is traced."""

    function: FunctionType | str
    """The function, or its place as `package.module:name`; a module that is not imported has nothing to patch."""
    replacement: Replacement

    @contextmanager
    def active(self, glue: Glue) -> Iterator[None]:
        """Redirect the function while the context is open."""
        function = _found(self.function) if isinstance(self.function, str) else self.function
        if function is None:
            yield
            return
        original = _copy(function)

        def redirected(*args: Any, **kwargs: Any) -> Any:
            return self.replacement(glue, original, args, kwargs)

        code, keywords = function.__code__, function.__kwdefaults__
        # the code of a function has to name as many free variables as the function holds
        function.__code__ = _redirection.__code__.replace(co_freevars=code.co_freevars)
        function.__kwdefaults__ = {"_redirected": redirected}
        try:
            yield
        finally:
            function.__code__, function.__kwdefaults__ = code, keywords


def _redirection(*args: Any, _redirected: Callable[..., Any], **kwargs: Any) -> Any:
    return _redirected(*args, **kwargs)


def _copy(function: FunctionType) -> FunctionType:
    twin = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(twin, function)
    return twin


def _found(place: str) -> FunctionType | None:
    module, _, name = place.partition(":")
    return getattr(sys.modules[module], name) if module in sys.modules else None


def _record(glue: Glue, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return glue.call_function(original.__wrapped__, original, args, kwargs)  # type: ignore[attr-defined]


_WRAPPED: dict[FunctionType, Patch] = {}


def wrapped_functions() -> tuple[Patch, ...]:
    """The patches of all functions that are wrapped now."""
    return tuple(_WRAPPED.values())


def wrap(function: F) -> F:
    """Take `function` for one operation whenever a model is traced, instead of looking into it.

    For code in a model's own forward that cannot be traced: what leaves torch (`mask.numpy()`, a C library, Python's
    `random`) or hangs on values. The call becomes one `call_function` node that runs exactly once for each batch, with
    the arguments and results it has in the model: tensors and numbers, also in nested containers. Outside of tracing
    nothing changes. What the result looked like is a guard, and so is every number that it returns beside tensors; for
    these, and where it returns other sizes than it was given, it is called on copies of a batch beforehand.

    Use it as a decorator, or as a call on a function of somebody else, however that is imported elsewhere:

        fxcalib.wrap(package.module.build_index)
        fxcalib.wrap(package.module.Model.get_rope_index)  # a method, of all instances

    The function stays wrapped until the program ends; `wrapped` does the same for a while. It must not call sequential
    targets or other modules with weights: these would be hidden from calibration.

    Args:
        function: a function written in Python, also a method given as `Class.method`.

    Returns:
        `function` itself.

    Raises:
        OptionError: it is no Python function, or one that waits between its results (a generator or coroutine).
    """
    plain = _plain(function)
    _WRAPPED.setdefault(plain, Patch(plain, _record))
    return function


@contextmanager
def wrapped(*functions: Callable[..., Any]) -> Iterator[None]:
    """Wrap `functions` while the context is open. A trace that was made in it needs it to trace other batches.

    Raises:
        OptionError: as `wrap`.
    """
    plain = [_plain(function) for function in functions]
    new = [function for function in dict.fromkeys(plain) if function not in _WRAPPED]
    _WRAPPED.update({function: Patch(function, _record) for function in new})
    try:
        yield
    finally:
        for function in new:
            _WRAPPED.pop(function, None)


def _plain(function: Any) -> FunctionType:
    inner = function.__func__ if isinstance(function, (staticmethod, classmethod, MethodType)) else function
    name = getattr(inner, "__qualname__", repr(inner))
    if not isinstance(inner, FunctionType):
        advice = (
            "it is a class; name one of its methods, as Class.method"
            if inspect.isclass(inner)
            else "wrap a function written in Python that calls it"
        )
        raise OptionError(f"cannot wrap {name}: a {type(inner).__name__} is no function written in Python; {advice}")
    if inspect.isgeneratorfunction(inner) or inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        raise OptionError(f"cannot wrap {name}: it waits between its results; wrap the function that collects them")
    return inner
