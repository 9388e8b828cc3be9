"""What forwards leave on their model, kept apart while several of them are on their way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxcalib.programs import out_of_step
from fxcalib.tracing.preserve import containers
from fxcalib.tracing.structure import PLAIN, same_constant

_MISSING = object()
_ALL = object()
"""Key of the content of a list, set, deque or tensor as a whole."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Something of a model that its forward changes."""

    held: Any
    """The dict, list, set, deque or tensor that changes."""
    key: Any
    module: str
    """Qualified name of the module that it belongs to."""
    attribute: str
    """The attribute of the module that it is, or is held by."""
    since: int | None = None
    """The only call of a target (from 1; 0 before the first) with which it changes, and from there to the next batch's
    same call; None where it is as before once the forward has ended."""

    @property
    def path(self) -> str:
        """How to name it to people."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def read(self) -> Any:
        """What is there, so that later changes do not reach it."""
        if self.key is not _ALL:
            return self.held.get(self.key, _MISSING)
        return self.held.detach().clone() if isinstance(self.held, torch.Tensor) else copy.copy(self.held)

    def write(self, value: Any) -> None:
        """Put back what was read."""
        if self.key is not _ALL:
            if value is _MISSING:
                self.held.pop(self.key, None)
            else:
                self.held[self.key] = value
        elif isinstance(self.held, torch.Tensor):
            with torch.no_grad():
                self.held.copy_(value)
        else:
            self.held.clear()
            getattr(self.held, "update" if isinstance(self.held, set) else "extend")(value)


@dataclass
class ForwardState:
    """The slots of a model; each forward has its own values in them from where it changes them on."""

    slots: tuple[Slot, ...] = ()

    @contextmanager
    def installed(self, own: dict[Slot, Any], call: int) -> Iterator[None]:
        """A forward that holds `own` runs its `call`-th call of a target; what it changes is added to `own`."""
        with self.lent(own, call):
            yield
            own.update({slot: slot.read() for slot in self.slots if slot.since is None or slot.since <= call})

    @contextmanager
    def lent(self, own: Mapping[Slot, Any], call: int) -> Iterator[None]:
        """As `installed`, and `own` stays what it is."""
        earlier = [slot for slot in self.slots if slot.since is None or slot.since < call]
        before = [(slot, slot.read()) for slot in earlier]
        for slot in earlier:
            if slot in own:
                slot.write(own[slot])
        try:
            yield
        finally:
            for slot, value in before:
                slot.write(value)


@dataclass
class _Seen:
    slot: Slot
    value: Any
    version: int


@dataclass
class StateWatch:
    """Finds what a forward changes on its model, from one call of a target to the next."""

    model: nn.Module
    _call: int = 0
    _calls: dict[tuple[int, Any], set[int]] = field(default_factory=dict)
    _reads: dict[tuple[str, str], int] = field(default_factory=dict)
    """Module and attribute -> the call with which it is read first."""
    _changes: dict[tuple[int, Any], _Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = dict(self.model.named_modules())
        self._buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        self._there = {id(container.held) for container in containers(self._modules)}
        self._start = self._last = self._now()
        self._contents = {
            id(seen.value): seen.value.detach().clone() for seen in self._start.values() if _written(seen.value)
        }

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note which attributes are read inside."""
        names = {id(module): name for name, module in reversed(self._modules.items())}

        def noted(module: nn.Module, attribute: str) -> Any:
            name = names.get(id(module))
            if name is not None:
                self._reads.setdefault((name, attribute), self._call)
            return object.__getattribute__(module, attribute)

        nn.Module.__getattribute__ = noted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def next_call(self) -> None:
        """A target is called, or the forward has ended: what has changed since belongs to the call before."""
        call, self._call = self._call, self._call + 1
        now = self._now()
        for key in self._start.keys() | now.keys():
            seen = now.get(key) or self._start[key]
            if _differ(self._last.get(key), now.get(key)) and key[0] in self._there:
                self._calls.setdefault(key, set()).add(call)
                self._changes[key] = seen
        self._last = now

    def state(self) -> ForwardState:
        """The state that forwards must not share.

        Raises:
            ModelError: what a forward leaves behind is read before the call that changes it: forwards that go on
                together would not find it.
        """
        slots = []
        for key, calls in self._calls.items():
            seen, only = self._changes[key], min(calls) if len(calls) == 1 else None
            before, after = self._start.get(key), self._last.get(key)
            if self._same_again(before, after):
                only = None
            elif only is None or self._reads.get((seen.slot.module, seen.slot.attribute), only) < only:
                path = seen.slot.path
                raise out_of_step(f"its buffer {path} in place" if path in self._buffers else f"its attribute {path}")
            slots.append(replace(seen.slot, since=only))
            if before is not None and _written(before.value) and seen.slot.key is not _ALL:
                slots.append(replace(seen.slot, held=before.value, key=_ALL, since=only))
        return ForwardState(tuple(slots))

    def _same_again(self, before: _Seen | None, after: _Seen | None) -> bool:
        if before is not None and after is not None and before.value is after.value and _written(before.value):
            return torch.equal(before.value, self._contents[id(before.value)])
        return not _differ(before, after)

    def _now(self) -> dict[tuple[int, Any], _Seen]:
        found = {}
        for container in containers(self._modules):
            held, module = container.held, container.module
            entries = held.items() if isinstance(held, dict) else [(_ALL, tuple(held))]
            for key, value in entries:
                version = value._version if isinstance(value, torch.Tensor) and _written(value) else 0
                slot = Slot(held, key, module, container.attribute or str(key))
                found[id(held), key] = _Seen(slot, value, version)
        return found


def _written(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_inference() and not value.is_meta


def _differ(one: _Seen | None, other: _Seen | None) -> bool:
    if one is None or other is None:
        return one is not other
    if one.version != other.version:
        return True
    if isinstance(one.value, tuple) and isinstance(other.value, tuple):
        return list(map(id, one.value)) != list(map(id, other.value))
    same = isinstance(one.value, PLAIN) and same_constant(one.value, other.value)
    return one.value is not other.value and not same
