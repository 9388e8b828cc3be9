"""What the glue changes on the model while its forward runs: attributes of modules, and what these hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from fxcalib.tracing.errors import Location
from fxcalib.tracing.failure import location_of
from fxcalib.tracing.preserve import Container, containers
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.structure import PLAIN, is_symbolic, same_constant

MISSING = object()
"""Stands for the value of an attribute that is not there."""

Key = tuple[int, Any]
"""Id of a container, and the key of an entry in it."""


@dataclass(frozen=True)
class Entry:
    """An attribute of a module, or something that it holds."""

    container: Container
    key: Any
    value: Any

    @property
    def module(self) -> str:
        """Qualified name of the module."""
        return self.container.module

    @property
    def attribute(self) -> str:
        """Name of the attribute."""
        return self.container.attribute or str(self.key)


class GlueState:
    """The state of the modules whose own code is recorded, before and after each run of the forward."""

    def __init__(self, modules: Mapping[str, nn.Module], below: Mapping[str, nn.Module]) -> None:
        """Watch `modules`, by qualified name; `below` are the others."""
        self._modules, self._below = modules, below
        self._names = {id(module): name for name, module in modules.items()}
        self._lines: dict[tuple[str, str], Location] = {}
        self._states: list[dict[Key, Entry]] = []
        self._there: set[int] = set()
        self._unwatched: set[Key] = set()

    def begin(self) -> None:
        """Look at the state before the first run."""
        self._there = {id(container.held) for container in containers(self._modules)}
        self._states = [self._now()]

    def end(self) -> None:
        """Look at the state after a run."""
        self._states.append(self._now())

    def assigned(self, module: nn.Module, name: str, frame: FrameType | None) -> None:
        """Be told that the code of `frame` is about to assign attribute `name` of one of the modules."""
        owner = self._names[id(module)]
        location = location_of(frame, {id(module): owner})
        if location is not None:
            self._lines[owner, name] = location

    def line(self, entry: Entry) -> Location | None:
        """The line that assigned the attribute last; None where it was changed in another way."""
        return self._lines.get((entry.module, entry.attribute))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Code that runs whenever the subgraphs do, and changes the state then as well."""
        before = self._now()
        try:
            yield
        finally:
            self._unwatched |= self._changed(before, self._now()).keys()

    def changes(self, run: int = 0) -> dict[Key, Entry]:
        """What a run has changed, as the run left it."""
        found = self._changed(self._states[run], self._states[run + 1])
        # what a new container holds belongs to the attribute that holds the container
        return {key: entry for key, entry in found.items() if key[0] in self._there and key not in self._unwatched}

    def shared(self) -> list[Entry]:
        """Changes of the first run to what other modules hold as well, such as a config."""
        held = {id(container.held) for container in containers(self._below)}
        return [entry for key, entry in self.changes().items() if key[0] in held]

    def after(self, run: int, key: Key) -> Any:
        """The value of an entry after a run."""
        found = self._states[run + 1].get(key)
        return MISSING if found is None else found.value

    def know_numbers(self, sizes: Sizes) -> None:
        """Put numbers in the place of symbols that the last run has left: they are those of its batch for good."""
        for entry in self.changes(len(self._states) - 2).values():
            number = sizes.known(entry.value.node.expr) if is_symbolic(entry.value) else None
            if number is not None and isinstance(entry.container.held, (dict, list)):
                entry.container.held[entry.key] = number
        self._states[-1] = self._now()

    def _now(self) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        for container in containers(self._modules):
            held = container.held
            for key, value in held.items() if isinstance(held, dict) else enumerate(held):
                found[id(held), key] = Entry(container, key, value)
        return found

    @staticmethod
    def _changed(before: Mapping[Key, Entry], after: Mapping[Key, Entry]) -> dict[Key, Entry]:
        found = {}
        for key in before.keys() | after.keys():
            one, other = before.get(key), after.get(key)
            if other is None:
                assert one is not None
                found[key] = Entry(one.container, one.key, MISSING)
            elif one is None or not _same(one.value, other.value):
                found[key] = other
        return found


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, PLAIN) and same_constant(one, other))
