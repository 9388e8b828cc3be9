"""Forwards that wait at each layer, each with what it keeps on the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_buffers import SUSPENDED, assert_calibrated_on_what_it_sees, batches, calibrated
from torch import Tensor, nn

from fxcalib.errors import ModelError


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.kept: Any = None


class AssignsBefore(Layers):
    """What is made before the first layer is read behind it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.mean(0)
        return self.layers[2](self.layers[1](self.layers[0](x) + self.kept) * self.kept)


class AssignsBetween(Layers):
    """And taken back at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.kept = x.mean(0)
        x = self.layers[2](self.layers[1](x) * self.kept)
        self.kept = None
        return x


class Remembers(Layers):
    """In a list, emptied by the next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        for layer in self.layers:
            self.kept.append(x.mean(0))
            x = layer(x + sum(self.kept))
        self.kept.clear()
        return x


class LayerHandsOn(nn.Module):
    """A layer leaves on itself what the next one reads."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.keys: Tensor | None = None

        def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
            self.keys = x.mean(0)
            return self.inner(x if keys is None else x * keys)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = self.layers[1](x, self.layers[0].keys)
        return self.layers[2](x, self.layers[0].keys)


class CountsBehind(Layers):
    """A running number that only its own place reads: each place meets the batches in order."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.kept += 1
        return self.layers[2](self.layers[1](x * self.kept))


class RunsAhead(CountsBehind):
    """A running number that the next batch reads before this one has come to change it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.kept)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (AssignsBefore, "Linear"),
        (AssignsBetween, "Linear"),
        (Remembers, "Linear"),
        (LayerHandsOn, "Layer"),
        (CountsBehind, "Linear"),
    ],
)
def test_each_forward_finds_its_own(make: Callable[[], nn.Module], targets: str) -> None:
    torch.manual_seed(0)
    model, given = make(), batches(5, 3, -4, 5)
    found = calibrated(model, given, targets, **SUSPENDED)
    if isinstance(found, CountsBehind):
        assert found.kept == len(given)
        found.kept = 0
    assert_calibrated_on_what_it_sees(found, given, model)


def test_what_the_next_batch_reads_too_early_is_refused() -> None:
    with pytest.raises(ModelError, match=r"changes its attribute kept, .*pipeline='basic'"):
        calibrated(RunsAhead(), batches(1, 2), "Linear", **SUSPENDED)
