"""A model as its own running forwards: each batch's forward waits wherever it calls a sequential target.

No graph and no assumption: exact for every model that runs, also for those that cannot be traced. What a forward holds
in its frames while it waits stays where it is, so only weights are moved on and off the device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from fxcalib.contexts import Contexts
from fxcalib.errors import ModelError
from fxcalib.forward_state import ForwardState, Slot, StateWatch
from fxcalib.planning import Part
from fxcalib.programs import Bound, Program
from fxcalib.tracing import Targets
from fxcalib.tracing.preserve import unchanged
from fxcalib.tracing.structure import flatten, to_device, unflatten

FORWARD = "forward"


class SuspendedForward:
    """The forward of one batch. It runs until it calls a target and waits there until it is told to go on.

    When it is dropped while it waits, its frames end, and with them what they hold.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[int, str],
        batch: Mapping[str, Any],
        state: ForwardState | None = None,
    ) -> None:
        """`targets`: id of each module that it waits at -> qualified name; `state`: what forwards do not share."""
        self._walk = _Walk(model, targets, batch, state or ForwardState())
        # the frames of the forward hold the walk, which no collector sees: only this object can tell that it is over
        weakref.finalize(self, self._walk.end).atexit = False

    @property
    def waits_at(self) -> str | None:
        """Qualified name of the target that is to be called next; None when the forward has ended."""
        return self._walk.waits_at

    def advance(self) -> None:
        """Call the target that the forward waits at and run on to the next."""
        self._walk.advance()

    def rehearse(self) -> None:
        """Call the target that the forward waits at on copies of its arguments, and go no further."""
        self._walk.rehearse()


class _Walk:
    """A forward in a greenlet, and the state of the thread as it is on either side of a switch."""

    def __init__(
        self, model: nn.Module, targets: Mapping[int, str], batch: Mapping[str, Any], state: ForwardState
    ) -> None:
        self._targets = targets
        self._state = state
        self._own: dict[Slot, Any] = {}
        self._call = 0
        self._random = torch.get_rng_state()
        self._caller: greenlet | None = None
        self._outside = Contexts.current()
        self._within = self._outside
        """The modes that hold where the forward waits: it may call its layers under autocast, say."""
        self._greenlet = greenlet(lambda: model(**batch))
        self._inside = False
        self.waits_at: str | None = None
        self._waiting: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None

    def advance(self) -> None:
        self._caller, self._outside = getcurrent(), Contexts.current()
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        self.waits_at, self._waiting = None, None
        try:
            with self._state.installed(self._own, self._call), _intercepted(self._arrive), self._outside.entered():
                self._greenlet.switch()
        finally:
            self._call += 1
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _arrive(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self._targets.get(id(module))
        if name is None or self._inside or getcurrent() is not self._greenlet:
            return original(module, *args, **kwargs)
        self.waits_at, self._waiting = name, (module, args, kwargs)
        self._within = Contexts.current()
        assert self._caller is not None
        with self._outside.entered():
            self._caller.switch()
        self._inside = True
        try:
            with _on_its_device(module):
                return original(module, *args, **kwargs)
        finally:
            self._inside = False

    def rehearse(self) -> None:
        assert self._waiting is not None
        module, args, kwargs = self._waiting
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            with self._state.lent(self._own, self._call), self._within.entered(), _on_its_device(module):
                leaves, structure = flatten((args, kwargs))
                copied_args, copied_kwargs = unflatten(structure, *copy.deepcopy(leaves))
                module(*copied_args, **copied_kwargs)
        finally:
            torch.set_rng_state(outside)

    def end(self) -> None:
        """End the forward where it waits."""
        self._waiting = None
        if self._greenlet:
            with Contexts.current().entered():
                self._greenlet.throw()


class SuspendedProgram(Program):
    """One subgraph for each call of a target, in the order in which the first batch calls them."""

    def __init__(self, model: nn.Module, targets: Targets, batch: Mapping[str, Any]) -> None:
        self.model = model
        self._targets = {id(model.get_submodule(name)): name for name in reversed(targets.names)}
        self._sequence, self._state = self._calls(batch)
        if not self._sequence:
            raise ModelError(f"the first batch calls none of the sequential targets {', '.join(targets.patterns)}")

    def _calls(self, batch: Mapping[str, Any]) -> tuple[list[str], ForwardState]:
        """The targets in the order of their calls, and what the forward changes on the model meanwhile."""
        calls: list[str] = []
        depth = 0
        with torch.no_grad(), unchanged(self.model):
            watch = StateWatch(self.model)

            def note(original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
                nonlocal depth
                name = self._targets.get(id(module))
                if name is None:
                    return original(module, *args, **kwargs)
                if not depth:
                    watch.next_call()
                    calls.append(name)
                depth += 1
                try:
                    return original(module, *args, **kwargs)
                finally:
                    depth -= 1

            with watch.reading(), _intercepted(note):
                self.model(**copy.deepcopy(dict(batch)))  # a forward may write to its inputs
            watch.next_call()
            return calls, watch.state()

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        forward = SuspendedForward(self.model, self._targets, copy.deepcopy(dict(batch)), self._state)
        with torch.no_grad():
            forward.advance()
        return Bound(0, {FORWARD: forward}, ())

    def once_more(self, bound: Bound, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        with unchanged(self.model):
            return self.bind(batch).values

    def parts(self, variant: int) -> Sequence[Part]:
        claimed: set[str] = set()
        parts = []
        for k, name in enumerate(self._sequence):
            inside = {f"{name}.{n}" if n else name for n, _ in self.model.get_submodule(name).named_modules()} - claimed
            claimed |= inside
            last = k == len(self._sequence) - 1
            parts.append(Part(k, frozenset(inside), (FORWARD,), () if last else (FORWARD,)))
        return parts

    def inputs(self, variant: int) -> tuple[str, ...]:
        return (FORWARD,)

    def targets(self, subgraph: int) -> tuple[str, ...]:
        return (self._sequence[subgraph],)

    def called(self, subgraph: int) -> Sequence[nn.Module]:
        return (self.model.get_submodule(self._sequence[subgraph]),)

    def run(
        self,
        variant: int,
        subgraph: int,
        values: Mapping[str, Any],
        signature: tuple[Any, ...],
        wanted: Collection[str],
    ) -> Mapping[str, Any]:
        forward: SuspendedForward = values[FORWARD]
        if forward.waits_at != self._sequence[subgraph]:
            raise ModelError(
                f"a batch calls {forward.waits_at or 'no more targets'} where the first one calls "
                f"{self._sequence[subgraph]}: its targets cannot be calibrated in step with the others. "
                "Calibrate on batches that take one way through the targets, or use pipeline='basic'"
            )
        if wanted:
            forward.advance()
        else:
            forward.rehearse()
        return values


@contextmanager
def _on_its_device(module: nn.Module) -> Iterator[None]:
    """Have `module` compute where its weights are, and its result brought to where its arguments are.

    Its forward is replaced, not its call: hooks of the model itself see tensors where all its others are.
    """
    forward, own = module.forward, module.__dict__.get("forward")

    def moving(*args: Any, **kwargs: Any) -> Any:
        home = next((leaf.device for leaf in flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)), None)
        away = next((p.device for p in module.parameters()), home)
        if home is None or away is None or away == home:
            return forward(*args, **kwargs)
        moved_args, moved_kwargs = to_device((args, kwargs), away)
        return to_device(forward(*moved_args, **moved_kwargs), home)

    module.__dict__["forward"] = moving
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def _intercepted(call: Callable[..., Any]) -> Iterator[None]:
    original = nn.Module.__call__

    def intercepted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(original, module, args, kwargs)

    nn.Module.__call__ = intercepted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
