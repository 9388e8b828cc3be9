"""Why a model cannot be traced and what to do about it, or what its trace assumes."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcalib.errors import BatchError, FxcalibError
from fxcalib.partitioning import partition
from fxcalib.tracing import Guard, TraceError, resolve_targets, trace
from fxcalib.tracing.errors import Location
from fxcalib.tracing.patching import wrapped
from fxcalib.tracing.preserve import preserved_state
from fxcalib.verification import compare, run_model

SUSPENDED = (
    "calibrate without a trace: pipeline='layer_sequential', suspended=True, or on the command line\n"
    "    fxcalib quantize MODEL --pipeline layer_sequential --suspended"
)
OWN_FAILURE = "the model itself fails on this batch"
_TRIES = 4


@dataclass(frozen=True)
class Explanation:
    """What came of a trace."""

    model: str
    """Class of the model."""
    targets: tuple[str, ...]
    """Patterns of the sequential targets."""
    traced: bool
    guards: tuple[Guard, ...] = ()
    """What the trace assumes."""
    exact: bool | None = None
    """Whether the subgraphs return the bits of the model on this batch; None where there are no weights to run it."""
    differences: tuple[str, ...] = ()
    """Where they do not."""
    kind: str = ""
    """What sort of problem it is, such as `data-dependent branch`."""
    reason: str = ""
    """The error in one line."""
    calls: tuple[Location, ...] = ()
    """The lines of the model that were running, from the outermost to the one that failed."""
    values: tuple[str, ...] = ()
    """Tensors of the failing line as `name: dtype[symbolic sizes]`."""
    module: str | None = None
    """The smallest submodule that fails by itself; None where nothing smaller than the model was found."""
    patch: str | None = None
    """Code to run before the trace; None where no function can be wrapped."""
    patch_suffices: bool = False
    """Whether the model was traced with that patch."""
    advice: str = ""
    """What else to do."""

    @property
    def location(self) -> Location | None:
        """The line of the model that cannot be traced, where there is one."""
        return self.calls[-1] if self.calls else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._success() if self.traced else self._failure())

    def _success(self) -> Iterator[str]:
        yield f"{self.model} can be traced at {', '.join(self.targets)}"
        if self.exact is None:
            yield "not compared with the model: it has no weights, or lies elsewhere than the batch"
        elif self.exact:
            yield "on this batch its subgraphs return what the model returns, bit for bit"
        else:
            yield "NOT EXACT: its subgraphs return something else than the model on this batch"
            yield from (f"  {difference}" for difference in self.differences)
            yield "  the model may keep state, or draw random numbers where torch does not see it (Python, numpy)"
        yield f"what the trace assumes, {len(self.guards)} guards:" if self.guards else "the trace assumes nothing"
        for guard in self.guards:
            yield f"  [{guard.kind}] {guard.text}"
            if ": " in guard.source:
                yield f"      {short_path(guard.source)}"

    def _failure(self) -> Iterator[str]:
        yield f"{self.model} cannot be traced: {self.kind}"
        yield f"  {self.reason}"
        if self.location is not None:
            yield f"  at {short_path(str(self.location))}"
        if self.values:
            yield "  values on this line"
            yield from (f"    {value}" for value in self.values)
        if len(self.calls) > 1:
            yield "  calls, from the outermost"
            for call in self.calls:
                yield f"    {short_path(str(call))}" + (f"  ({call.module})" if call.module else "")
        if self.module is not None:
            yield f"  the smallest module that fails by itself: {self.module}"
        yield "what to do"
        if self.patch is not None:
            found = "with it, the model traces" if self.patch_suffices else "with it, the trace gets past this line"
            yield f"  run this before the trace; {found}:"
            yield from (f"    {line}".rstrip() for line in self.patch.splitlines())
        advice = [text for text in (self.advice, "" if self.kind == OWN_FAILURE else SUSPENDED) if text]
        for index, text in enumerate(advice):
            yield f"  {'or ' if index or self.patch is not None else ''}{text}"


def explain(
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
    *,
    ignore: Sequence[str] = (),
) -> Explanation:
    """Trace `model(**batch)` and say what came of it; `print` the result.

    If the trace fails: the model's line, the calls that lead to it, the values on it, the kind of problem, the smallest
    submodule that fails by itself, and code that wraps the function in question, tried out. If it succeeds: every
    assumption, and whether the subgraphs return the bits of the model. The model is left as it was; where it has
    weights, it is run.

    Args:
        model: any module.
        batch: keyword arguments of `model`, such as `input_ids` (batch, sequence) int64.
        targets, ignore: as `trace` takes them.

    Raises:
        TargetError: a target matches nothing.
        BatchError: the batch holds no tensor.
    """
    resolved = resolve_targets(model, targets, ignore)
    basis = Explanation(type(model).__name__, resolved.patterns, traced=True)
    try:
        traced = trace(model, batch, targets, ignore=ignore)
        parts = partition(traced)
    except TraceError as error:
        return _Search(model, batch, resolved.patterns, ignore, error).explanation()
    basis = replace(basis, guards=traced.guards)
    if not _can_run(model, batch):
        return basis
    found = compare(parts, batch)
    return replace(basis, exact=found.identical, differences=found.differences)


class _Search:
    """Looks for the smallest module that fails, and for a function whose wrapping helps."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        patterns: tuple[str, ...],
        ignore: Sequence[str],
        error: TraceError,
    ) -> None:
        self._model, self._batch, self._patterns, self._ignore = model, batch, patterns, tuple(ignore)
        self._error = error

    def explanation(self) -> Explanation:
        error = self._error
        found = Explanation(
            type(self._model).__name__,
            self._patterns,
            traced=False,
            kind=error.kind,
            reason=_reason(error),
            calls=error.calls,
            values=error.values,
        )
        runs = _can_run(self._model, self._batch)
        if runs:
            try:
                run_model(self._model, self._batch)
            except BatchError as own:
                return replace(found, kind=OWN_FAILURE, reason=str(own), advice=_OWN_ERROR)
            found = replace(found, module=self._smallest())
        patch, suffices = self._patch()
        advice = ""
        if not runs and not suffices:
            advice = "trace with weights and a real batch: what the model asks of data is then looked up and guarded"
        elif patch is None and error.calls:
            advice = "move the line into a function of its own that calls no module, and wrap that with fxcalib.wrap"
        return replace(found, patch=patch, patch_suffices=suffices, advice=advice)

    def _smallest(self) -> str | None:
        """The innermost module on the way to the failing line that cannot be traced on what it is called with."""
        names = list(dict.fromkeys(call.module for call in self._error.calls if call.module))
        called = self._called(names)
        for name in reversed(names):
            module = self._model.get_submodule(name)
            inside = [t for t in resolve_targets(self._model, self._patterns, self._ignore).names if t.startswith(name)]
            targets = [t.removeprefix(f"{name}.") for t in inside if t != name] or None
            if name not in called:
                continue
            try:
                trace(module, called[name], targets)
            except TraceError as error:
                if error.location == self._error.location or _same_line(error.location, self._error.location):
                    return name
            except FxcalibError:
                continue  # it has no submodules, or is given no tensor
        return None

    def _called(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What each of these modules is called with in a real run of the model."""
        found: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(preserved_state(self._model))
            for name in names:
                module = self._model.get_submodule(name)
                signature = inspect.signature(module.forward)

                def keep(_: nn.Module, args: Any, kwargs: Any, n: str = name, s: Any = signature) -> None:
                    bound = s.bind(*args, **kwargs).arguments
                    rest = [p.name for p in s.parameters.values() if p.kind is p.VAR_KEYWORD]
                    extra = bound.pop(rest[0], {}) if rest else {}
                    found.setdefault(n, {**bound, **extra})

                handle = module.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
            self._model(**copy.deepcopy(dict(self._batch)))
        return found

    def _patch(self) -> tuple[str | None, bool]:
        """Code that wraps a function, the innermost that helps, and whether the model can then be traced."""
        first = None
        places = dict.fromkeys(call.importable for call in reversed(self._error.calls) if call.importable is not None)
        for place in list(places)[:_TRIES]:
            try:
                with wrapped(_imported(place)):
                    trace(self._model, self._batch, self._patterns, ignore=self._ignore)
                return patch_for(place), True
            except TraceError as error:
                if error.kind == "module in a wrapped function":
                    break  # what calls this function calls the module as well
                if error.kind == "unsupported type":
                    continue  # what it returns is of no use to a graph: its caller may do better
                past = error.location is not None and not _same_line(error.location, self._error.location)
                first = first or (patch_for(place) if past else None)
            except FxcalibError:
                continue
        return first, False


_OWN_ERROR = "give the model a batch that it can run: model(**batch) has to work before it can be traced"


def patch_for(place: str) -> str:
    """Code that wraps the function at `package.module:name`."""
    module, _, name = place.partition(":")
    if module == "__main__":
        return f"import fxcalib\n\nfxcalib.wrap({name})"
    # code that comes with a checkpoint can be imported only when transformers has put it into its place
    when = "  # after the model is loaded" if module.startswith("transformers_modules.") else ""
    return f"import fxcalib\nfrom {module} import {name.partition('.')[0]}{when}\n\nfxcalib.wrap({name})"


def short_path(source: str) -> str:
    """A source line, with its path relative to the current folder if it lies in there."""
    folder = f"{Path.cwd()}/"
    return source.removeprefix(folder)


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return attrgetter(name)(sys.modules[module])


def _same_line(one: Location | None, other: Location | None) -> bool:
    return one is not None and other is not None and (one.file, one.line) == (other.file, other.line)


def _reason(error: TraceError) -> str:
    first = str(error).splitlines()[0]
    return first.partition(" cannot be traced: ")[2] or first


def _can_run(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, torch.Tensor))]
    return not any(tensor.is_meta for tensor in tensors) and len({tensor.device for tensor in tensors}) <= 1
