"""Statistics of module inputs, computed once for modules that are fed the very same tensor.

q, k and v read one tensor, so do gate and up: their second moments and ranges are equal, and collecting them takes a
large part of a calibration pass. Which modules share is found from the tensors themselves, batch by batch, never
assumed: modules start together when their first inputs are one object, and part, each with the right history, in the
first batch where they are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcalib.errors import FxcalibError
from fxcalib.math.hessian import Hessian
from fxcalib.math.ranges import MinMax, Range


@dataclass
class InputStatistics:
    """What is collected of one input."""

    hessian: Hessian | None = None
    range: Range | None = None
    batches: list[int] = field(default_factory=list)
    """Index of the batch of each update."""
    checks: list[Tensor] = field(default_factory=list)
    """After each update a number, on the input's device, that is not finite if the statistics are not."""

    @torch.no_grad()
    def add(self, inputs: Tensor, real: Tensor | None, batch: int) -> None:
        """Add inputs (..., I); `real`, bool of the leading shape, is false for padding."""
        self.batches.append(batch)
        if self.range is not None:
            self.range.add(inputs, real)
            low, high = self.range.extremes()
            self.checks.append((high - low).sum())
        if self.hessian is not None:
            if real is not None:
                # Zero rows add nothing to X^T X, and need no wait for the number of real ones. NaN must not survive.
                inputs = torch.where(real[..., None], inputs, 0.0)
            self.hessian.add(inputs)
            check = self.hessian.sum_II.diagonal().sum()
            if self.range is not None:
                check = check + self.checks.pop()
            self.checks.append(check)

    def clone(self) -> InputStatistics:
        """Statistics of their own with the same contents."""
        return InputStatistics(
            None if self.hessian is None else self.hessian.clone(),
            None if self.range is None else self.range.clone(),
            list(self.batches),
            list(self.checks),
        )

    def first_bad_batch(self) -> int | None:
        """Index of the batch whose inputs first held NaN or infinity; waits for the device."""
        if not self.checks:
            return None
        bad = ~torch.isfinite(torch.stack(self.checks))
        return self.batches[int(bad.int().argmax())] if bool(bad.any()) else None


def _version(tensor: Tensor) -> int:
    """Counts the changes in place; tensors made in inference mode do not count theirs."""
    return 0 if tensor.is_inference() else int(tensor._version)


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was when a module read it, without keeping it alive."""

    reference: weakref.ref[Tensor]
    version: int

    @staticmethod
    def of(tensor: Tensor) -> _Seen:
        return _Seen(weakref.ref(tensor), _version(tensor))

    def is_(self, tensor: Tensor) -> bool:
        return self.reference() is tensor and self.version == _version(tensor)


@dataclass
class _Update:
    """An input that some members of a group have read and others may still read."""

    inputs: Tensor
    version: int
    real: Tensor | None
    batch: int
    readers: set[str]


@dataclass
class _Group:
    statistics: InputStatistics
    recipe: Hashable
    members: set[str]
    first: _Seen | None
    """The only input so far; None after the second."""
    waiting: _Update | None = None


class SharedInputs:
    """The statistics of every observed module's inputs."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._beginning: list[_Group] = []

    def see(
        self,
        name: str,
        recipe: Hashable,
        make: Callable[[], InputStatistics],
        inputs: Tensor,
        real: Tensor | None,
        batch: int,
    ) -> None:
        """Module `name` reads `inputs` in batch number `batch`; those of equal `recipe` may share what `make` makes."""
        group = self._groups.get(name)
        if group is None:
            self._begin(name, recipe, make, inputs, real, batch)
            return
        if len(group.members) == 1:
            group.first = None
            group.statistics.add(inputs, real, batch)
            return
        waiting = group.waiting
        if waiting is None:
            group.first = None
            group.waiting = _Update(inputs, _version(inputs), real, batch, {name})
            return
        same = waiting.inputs is inputs and _version(inputs) == waiting.version
        if not same or name in waiting.readers:
            self._settle(group)
            self.see(name, recipe, make, inputs, real, batch)
            return
        waiting.readers.add(name)
        if waiting.readers == group.members:
            self._settle(group)

    def finish(self) -> list[tuple[list[str], InputStatistics]]:
        """Settle what is open; the groups in order of their first call: member names (sorted) and statistics."""
        for group in list(self._groups.values()):
            if group.waiting is not None:
                self._settle(group)
        unique = {id(group): group for group in self._groups.values()}
        return [(sorted(group.members), group.statistics) for group in unique.values()]

    def _begin(
        self,
        name: str,
        recipe: Hashable,
        make: Callable[[], InputStatistics],
        inputs: Tensor,
        real: Tensor | None,
        batch: int,
    ) -> None:
        self._beginning = [g for g in self._beginning if g.first is not None and g.first.reference() is not None]
        for group in self._beginning:
            if group.recipe == recipe and group.first is not None and group.first.is_(inputs):
                group.members.add(name)
                self._groups[name] = group
                return
        group = _Group(make(), recipe, {name}, _Seen.of(inputs))
        group.statistics.add(inputs, real, batch)
        self._groups[name] = group
        self._beginning.append(group)

    def _settle(self, group: _Group) -> None:
        """Add what is waiting; members that did not read it leave with the statistics as they were before."""
        waiting = group.waiting
        if waiting is None:
            return
        others = group.members - waiting.readers
        if others:
            parted = _Group(group.statistics.clone(), group.recipe, others, None)
            self._groups.update(dict.fromkeys(others, parted))
        group.members, group.waiting = waiting.readers, None
        if _version(waiting.inputs) != waiting.version:
            raise FxcalibError(
                f"the input of {', '.join(map(repr, sorted(waiting.readers)))} was changed in place in batch "
                f"{waiting.batch} after it was read; let the model change a copy"
            )
        group.statistics.add(waiting.inputs, waiting.real, waiting.batch)


def union_of_extremes(statistics: list[InputStatistics]) -> MinMax | None:
    """The range that covers those of all `statistics`; None where none has any."""
    union = None
    for each in statistics:
        if each.range is not None:
            union = union or MinMax()
            for end in each.range.extremes():
                union.add(end, None)
    return union
