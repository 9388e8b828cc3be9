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
from fxcalib.math.hessian import Hessian, InputShift
from fxcalib.math.pruning import SquareSums
from fxcalib.math.ranges import MinMax, Range


@dataclass
class InputStatistics:
    """What is collected of one input."""

    hessian: Hessian | None = None
    range: Range | None = None
    shift: InputShift | None = None
    unpaired: int = 0
    """Updates without an original input, or with one of another shape, although `shift` is collected."""
    batches: list[int] = field(default_factory=list)
    """Index of the batch of each update."""
    checks: list[Tensor] = field(default_factory=list)
    """After each update a number, on the input's device, that is not finite if the statistics are not."""
    squares: SquareSums | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor, real: Tensor | None, batch: int, original: Tensor | None = None) -> None:
        """Add inputs (..., I); `real`, bool of the leading shape, is false for padding.

        `original` is what the original model's module was fed in the place of `inputs`.
        """
        self.batches.append(batch)
        if self.shift is not None:
            if original is None or original.shape != inputs.shape:
                self.unpaired += 1
            else:
                # where a row of the input is zero, what it is paired with adds nothing
                self.shift.add(inputs if real is None else torch.where(real[..., None], inputs, 0.0), original)
        if self.range is not None:
            self.range.add(inputs, real)
            low, high = self.range.extremes()
            self.checks.append((high - low).sum())
        if self.squares is not None:
            self.squares.add(inputs if real is None else torch.where(real[..., None], inputs, 0.0))
            self.checks.append(self.squares.sum_I.sum())
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
            None if self.shift is None else self.shift.clone(),
            self.unpaired,
            list(self.batches),
            list(self.checks),
            None if self.squares is None else self.squares.clone(),
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
    original: weakref.ref[Tensor] | None

    @staticmethod
    def of(tensor: Tensor, original: Tensor | None) -> _Seen:
        return _Seen(weakref.ref(tensor), _version(tensor), None if original is None else weakref.ref(original))

    def is_(self, tensor: Tensor, original: Tensor | None) -> bool:
        alike = original is (None if self.original is None else self.original())
        return alike and self.reference() is tensor and self.version == _version(tensor)


@dataclass
class _Update:
    """An input that some members of a group have read and others may still read."""

    inputs: Tensor
    version: int
    real: Tensor | None
    batch: int
    original: Tensor | None
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
        original: Tensor | None = None,
    ) -> None:
        """Module `name` reads `inputs` in batch number `batch`; those of equal `recipe` may share what `make` makes.

        In the original model it reads `original`; modules share only where these are one tensor too.
        """
        group = self._groups.get(name)
        if group is None:
            self._begin(name, recipe, make, inputs, real, batch, original)
            return
        if len(group.members) == 1:
            group.first = None
            group.statistics.add(inputs, real, batch, original)
            return
        waiting = group.waiting
        if waiting is None:
            group.first = None
            group.waiting = _Update(inputs, _version(inputs), real, batch, original, {name})
            return
        same = waiting.inputs is inputs and _version(inputs) == waiting.version and waiting.original is original
        if not same or name in waiting.readers:
            self._settle(group)
            self.see(name, recipe, make, inputs, real, batch, original)
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
        original: Tensor | None,
    ) -> None:
        self._beginning = [g for g in self._beginning if g.first is not None and g.first.reference() is not None]
        for group in self._beginning:
            if group.recipe == recipe and group.first is not None and group.first.is_(inputs, original):
                group.members.add(name)
                self._groups[name] = group
                return
        group = _Group(make(), recipe, {name}, _Seen.of(inputs, original))
        group.statistics.add(inputs, real, batch, original)
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
        group.statistics.add(waiting.inputs, waiting.real, waiting.batch, waiting.original)


class OriginalInputs:
    """What the modules read in the original model, until they read the batch in the compressed one."""

    def __init__(self) -> None:
        self._batch = -1
        self._inputs: dict[str, list[Tensor]] = {}

    def keep(self, name: str, inputs: Tensor, batch: int) -> None:
        """Module `name` reads `inputs` in batch number `batch`; what is left of earlier batches is dropped."""
        if batch != self._batch:
            self._batch, self._inputs = batch, {}
        self._inputs.setdefault(name, []).append(inputs)

    def take(self, name: str, batch: int) -> Tensor | None:
        """What module `name` has read at the same of its calls; None where there was none."""
        kept = self._inputs.get(name) if batch == self._batch else None
        return kept.pop(0) if kept else None


def union_of_extremes(statistics: list[InputStatistics]) -> MinMax | None:
    """The range that covers those of all `statistics`; None where none has any."""
    union = None
    for each in statistics:
        if each.range is not None:
            union = union or MinMax()
            for end in each.range.extremes():
                union.add(end, None)
    return union
