"""What is known of a value in a model's computation: which channel of which source each of its elements scales with.

Each output channel of a source (a norm, a linear module) has a *label*, a number of its own. An element has the label
c if it is multiplied by t whenever channel c of its source is multiplied by t > 0, and -1 if no source changes it.
Labels that meet an operation which does not commute with such factors are *frozen*: their channels keep their scale.
What is not understood freezes what it reads, so that what is left is proven by the structure of the computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_LABEL = -1

Size = object
"""A number, or a symbolic expression of sizes of the batch, which can be multiplied and compared."""


@dataclass(frozen=True)
class WeightView:
    """A parameter, or a view of it."""

    path: str
    """Qualified name of the parameter."""
    axes: tuple[int | None, ...]
    """For each dimension the axis of the parameter that it runs along from end to end; None where it does not."""


@dataclass(frozen=True)
class Value:
    """A tensor of the computation.

    `labels` (int64) has the tensor's number of dimensions, each of them of its size or of size 1 where all its
    elements have the same labels; None where no element has one.
    """

    shape: tuple[Size, ...]
    labels: Tensor | None = None
    weight: WeightView | None = None

    def varies(self, dim: int) -> bool:
        """Whether labels differ along `dim`."""
        return self.labels is not None and self.labels.shape[dim] != 1

    def with_labels(self, labels: Tensor | None) -> Value:
        """The same tensor with other labels."""
        return Value(self.shape, labels, self.weight)


@dataclass(frozen=True, eq=False)
class Read:
    """A contraction with a parameter along its `axis`."""

    path: str
    axis: int
    labels: Tensor | None
    """Label at each position of the axis, (width,) int64; None where none has one."""

    def same(self, other: Read) -> bool:
        """Whether the same labels are read along the same axis."""
        if self.labels is None or other.labels is None:
            return self.axis == other.axis and self.labels is other.labels
        return self.axis == other.axis and torch.equal(self.labels, other.labels)


@dataclass
class Ledger:
    """The labels that are given out, what became of them, and which parameters read which of them."""

    sources: dict[str, range] = field(default_factory=dict)
    """Name of a source -> its labels, which follow on those of the source before it."""
    reads: dict[str, list[Read]] = field(default_factory=dict)
    """Parameter -> the ways in which it is read; more than one where its calls differ."""
    spoiled: set[str] = field(default_factory=set)
    """Parameters that are read by something else than a contraction."""
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _next: int = 0

    def labels_of(self, source: str, channels: int) -> range:
        """The labels of a source, the same at each of its calls."""
        if source not in self.sources:
            self.sources[source] = range(self._next, self._next + channels)
            self._next += channels
        return self.sources[source]

    def freeze(self, values: Iterable[Value], why: str) -> None:
        """All labels of these values keep their scale; parameters among them are not ours to change."""
        for value in values:
            if value.labels is not None:
                self._frozen.append((value.labels.reshape(-1), why))
            if value.weight is not None:
                self.spoiled.add(value.weight.path)

    def frozen(self) -> Tensor:
        """For each label whether it is frozen, (labels,) bool."""
        mask = torch.zeros(self._next, dtype=torch.bool)
        for labels, _ in self._frozen:
            mask[labels[labels != NO_LABEL]] = True
        return mask

    def reason(self, label: int) -> str:
        """What froze a label first."""
        return next(why for labels, why in self._frozen if bool((labels == label).any()))

    def read(self, path: str, axis: int, labels: Tensor | None, width: int) -> None:
        """A contraction with the parameter `path` along its `axis`; `labels` (width,) or (1,)."""
        found = Read(path, axis, None if labels is None else labels.expand(width))
        known = self.reads.setdefault(path, [])
        if not any(found.same(other) for other in known):
            known.append(found)
