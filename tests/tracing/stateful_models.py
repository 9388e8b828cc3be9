"""Models whose forward changes attributes: some for nobody, some for the next call, some on a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from semantic_models import Layers
from torch import Tensor, nn


class Stateful(Layers):
    """Layers with attributes of their own, given with the class, and `forward` in two halves."""

    settings: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__()
        cls.settings = settings

    def __init__(self) -> None:
        super().__init__()
        for name, value in self.settings.items():
            setattr(self, name, value() if callable(value) else value)

    def prepared(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](self.prepared(x)))


class AddsOne(Stateful, c=lambda: torch.ones(4)):
    def prepared(self, x: Tensor) -> Tensor:
        self.c = self.c + 1
        return x * self.c


class ReplacesBuffer(Stateful, mean=lambda: nn.Buffer(torch.zeros(4))):
    def prepared(self, x: Tensor) -> Tensor:
        y = x - self.mean
        self.mean = self.mean * 0.5 + x.mean(0)
        return y


class Counts(Stateful, calls=0):
    def prepared(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class CountsToTen(Stateful, calls=0):
    def prepared(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls < 10 else -x


class Toggles(Stateful, flipped=False):
    def prepared(self, x: Tensor) -> Tensor:
        self.flipped = not self.flipped
        return x if self.flipped else -x


class StartsLate(Stateful, state=None):
    def prepared(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = torch.zeros(4)
        self.state = torch.tanh(self.state + x.mean(0))
        return x + self.state


class StartsLateInPlace(Stateful, state=None):
    def prepared(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = torch.zeros(4)
        self.state += x.mean(0)
        return x + self.state


class KeepsTheFirst(Stateful, first=None):
    def prepared(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean(0)
        return x - self.first


class KeepsWhatALayerReturned(Stateful, first=None):
    def prepared(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.layers[0](x.mean(0))
        return x - self.first


class KeepsTheLongest(Stateful, longest=0):
    def prepared(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[0])
        return x * self.longest


class KeepsItem(Stateful, notes=lambda: {"seen": [0]}):
    def prepared(self, x: Tensor) -> Tensor:
        self.notes["seen"] = [self.notes["seen"][0] + 1]
        return x + self.notes["seen"][0]


class KeepsHistory(Stateful, history=list):
    def prepared(self, x: Tensor) -> Tensor:
        self.history.append(x.mean(0))
        return x + sum(self.history)


class Outer(nn.Module):
    """The one that keeps something is not the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AddsOne()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class LeavesPositions(Stateful, deltas=None):
    """Keeps what only a later call with a cache would read."""

    def prepared(self, x: Tensor, cached: bool = False) -> Tensor:
        if cached:
            return x + self.deltas
        self.deltas = x.argmax(-1, keepdim=True)
        return x + self.deltas


class GrowsTable(Stateful, table=None, length=0):
    def prepared(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.length:
            self.length = x.shape[0]
            self.table = torch.arange(self.length, dtype=x.dtype)[:, None] * torch.ones(4)
            self.table[:, 1:].mul_(2)
        return x + self.table[: x.shape[0]]


class MakesOnce(Stateful, bias=None, ready=False):
    def prepared(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.bias = torch.linspace(0, 1, 4)
            self.ready = True
        return x + self.bias


class SetsFrequencies(
    Stateful, inv_freq=lambda: nn.Buffer(torch.ones(4)), original=lambda: nn.Buffer(torch.arange(4.0))
):
    def prepared(self, x: Tensor) -> Tensor:
        self.register_buffer("inv_freq", self.original * 2, persistent=False)
        return x * self.inv_freq


class CollectsAnew(Stateful, seen=list, notes=dict):
    def prepared(self, x: Tensor) -> Tensor:
        self.seen.clear()
        self.notes = {"rows": x.shape[0]}
        for value in self.pieces(x):
            self.seen.append(value)
        return torch.stack(self.seen).sum(0) + self.notes["rows"]

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        yield x * 2


class LeavesNoise(Stateful, total=lambda: nn.Buffer(torch.zeros(4)), last=None):
    """Draws, and writes to a buffer in place, which is replayed."""

    def prepared(self, x: Tensor) -> Tensor:
        self.total += x.mean(0)
        self.last = x + torch.rand(4) + self.total
        return self.last


class CountsInMethod(Stateful, calls=0, c=lambda: torch.ones(4)):
    def prepared(self, x: Tensor) -> Tensor:
        return self.counted(x) * 2

    def counted(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.c = self.c + self.calls
        return x * self.c


class PutsStateOnLayers(nn.Module):
    """Gives each layer below its own code a state for this batch; the layers carry it on, and count their calls."""

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.state: Tensor | None = None
            self.scale: Tensor | float = 1.0

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x[0]) if self.state is None else self.state
            self.state = torch.tanh(state + x.sum(0))
            return self.inner(x) * self.scale + self.state

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scan = PutsStateOnLayers.Scan()

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.scan.scale = x.mean(0)
            first = self.scan(x)
            self.scan.scale = 2.0
            return self.scan(first)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, x: Tensor, start: bool = True) -> Tensor:
        for block in self.blocks:
            if start:
                block.scan.state = None
        for block in self.blocks:
            x = block(x)
        return x
