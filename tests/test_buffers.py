"""Calibration runs each layer twice on every batch; what a model keeps in buffers it changes once for each, as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcalib import QuantizationModifier, calibrate
from fxcalib.errors import ModelError

Batches = list[dict[str, Any]]
SUSPENDED = {"pipeline": "layer_sequential", "suspended": True}
LARGEST = 448
"""Of float8_e4m3fn."""


def batches(*shifts: float) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3 + i, 4, generator=generator) + shift} for i, shift in enumerate(shifts)]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.register_buffer("steps", torch.zeros(()))


class CountsInGlue(Layers):
    """Its way hangs on the counter, too."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = self.layers[0](x * self.steps)
        return self.layers[1](x if self.steps < 3 else -x)


class Counting(nn.Module):
    counts_calls = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.counts_calls:
            self.calls += 1
        return self.inner(x * self.steps) / (self.calls + 1)


class CountingCalls(Counting):
    counts_calls = True


class CountsInLayers(nn.Module):
    def __init__(self, layer: type[Counting] = Counting) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        return self.layers[1](x if x.sum() > 0 else -x)


def inputs_of(model: nn.Module, given: Batches) -> dict[str, list[Tensor]]:
    """What each Linear is called with, batch after batch, in the model's own forward."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in copy.deepcopy(given):
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def calibrated(model: nn.Module, given: Batches, targets: str, **options: Any) -> nn.Module:
    model = copy.deepcopy(model)
    calibrate(model, copy.deepcopy(given), QuantizationModifier(scheme="FP8"), targets=targets, **options)
    return model


def assert_calibrated_on_what_it_sees(model: nn.Module, given: Batches, fresh: nn.Module) -> None:
    """Each scale is that of what the compressed layers before it, in the model's own forward, have made."""
    again = copy.deepcopy(model)
    for name, buffer in fresh.named_buffers():
        again.get_buffer(name).copy_(buffer)
    for module in again.modules():
        if isinstance(module, Counting):
            module.calls = 0
    for name, seen in inputs_of(again, given).items():
        expected = max(inputs.abs().max() for inputs in seen) / LARGEST
        torch.testing.assert_close(again.get_submodule(name).input_scale.squeeze(), expected, msg=name)


@pytest.mark.parametrize("options", [{}, SUSPENDED, {"pipeline": "basic"}], ids=["traced", "suspended", "basic"])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (CountsInGlue, "Linear"),
        (CountsInLayers, "Linear"),
        (CountsInLayers, "Counting"),
        (lambda: CountsInLayers(CountingCalls), "CountingCalls"),
    ],
)
@pytest.mark.filterwarnings("ignore:the basic pipeline")
def test_buffers_are_written_once_for_each_batch(
    make: Callable[[], nn.Module], targets: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, given = make(), batches(5, 3, -4, 5)
    found = calibrated(model, given, targets, **options)
    for name, buffer in found.named_buffers():
        assert buffer == len(given), name
    if options.get("pipeline") != "basic":
        assert_calibrated_on_what_it_sees(found, given, model)


def test_a_chain_is_looked_at_without_a_trace_of_it() -> None:
    model = nn.Sequential(CountingCalls(), CountingCalls())
    given = [{"input": batch["x"]} for batch in batches(1, 2)]
    found = calibrated(model, given, "CountingCalls", pipeline="layer_sequential")
    assert [layer.steps for layer in found] == [layer.calls for layer in found] == [2, 2]
    assert_calibrated_on_what_it_sees(found, given, model)


def test_a_buffer_that_later_layers_read_is_carried_with_each_batch() -> None:
    class Carries(Layers):
        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            steps = self.steps
            return self.layers[1](self.layers[0](x * steps) * steps)

    torch.manual_seed(0)
    model, given = Carries(), batches(5, 3, -4)
    for options in ({"pipeline": "sequential"}, SUSPENDED):
        assert_calibrated_on_what_it_sees(calibrated(model, given, "Linear", **options), given, model)


def test_a_buffer_that_ties_batches_together_across_layers_is_refused() -> None:
    class Running(Layers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x - self.steps)
            self.steps += x.mean()
            return self.layers[1](x)

    class Shared(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Counting()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.layers[0](x))

    for model, targets, name in ((Running(), "Linear", "steps"), (Shared(), "Counting", "layers.0.steps")):
        for options in ({}, SUSPENDED):
            with pytest.raises(ModelError, match=f"changes its buffer {name} in place.*pipeline='basic'"):
                calibrated(model, batches(1, 2), targets, **options)


@dataclass(frozen=True)
class Prompt:
    x: Tensor
    scale: Tensor
    label: str = "prompt"


class TakesDataclass(Layers):
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
            return self.inner(x * prompt.scale)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Scaling() for _ in range(2)])

    def forward(self, prompt: Prompt) -> Tensor:
        assert type(prompt) is Prompt
        x = prompt.x
        for layer in self.layers:
            x = layer(x, prompt)
        return x


DATACLASSES = [{"prompt": Prompt(batch["x"], batch["x"].mean(0))} for batch in batches(1, 2, 3)]


@pytest.mark.parametrize(
    "options", [{}, SUSPENDED, {"pipeline": "layer_sequential"}, {"pipeline": "basic"}], ids=lambda o: str(o)
)
@pytest.mark.filterwarnings("ignore:the basic pipeline")
def test_batches_may_hold_dataclasses(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = TakesDataclass()
    found = calibrated(model, DATACLASSES, "Scaling", **options)
    if options.get("pipeline") != "basic":
        assert_calibrated_on_what_it_sees(found, DATACLASSES, model)
    first = max((p["prompt"].x * p["prompt"].scale).abs().max() for p in DATACLASSES) / LARGEST
    torch.testing.assert_close(found.layers[0].inner.input_scale.squeeze(), first)
