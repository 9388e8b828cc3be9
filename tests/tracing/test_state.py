"""What a forward keeps on the model: assigned for nobody it does not matter, for the next call it is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import stateful_models as models
import torch
from torch import nn

from fxcalib import QuantizationModifier, calibrate, partition, trace, wrapped
from fxcalib.errors import ModelError
from fxcalib.tracing import TraceError

SEQUENTIAL = ("Linear", ["layers.1"])


def batch(rows: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))}


REFUSED = {
    models.AddsOne: "c",
    models.ReplacesBuffer: "mean",
    models.Counts: "calls",
    models.CountsToTen: "calls",
    models.Toggles: "flipped",
    models.StartsLate: "state",
    models.StartsLateInPlace: "state",
    models.KeepsTheFirst: "first",
    models.KeepsWhatALayerReturned: "first",
    models.KeepsTheLongest: "longest",
    models.KeepsItem: "notes",
    models.KeepsHistory: "history",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_what_the_next_call_would_read_is_refused(cls: type[models.Stateful]) -> None:
    model = cls().requires_grad_(False)
    with pytest.raises(TraceError) as caught:
        trace(model, batch(3), ["layers.1"])
    said = str(caught.value)
    assert f"{cls.__name__} cannot be traced: what its forward does depends on what an earlier call has left in" in said
    assert f"'{REFUSED[cls]}' of the model ({cls.__name__})" in said
    assert "fxcalib.wrap" in said and "pipeline='basic'" in said
    assert caught.value.kind == "state kept between calls"
    assert_unchanged(model, cls())


def test_suspended_forwards_refuse_what_ties_batches_together() -> None:
    model, batches = models.KeepsWhatALayerReturned(), [batch(3), batch(4)]
    with pytest.raises(ModelError, match="changes its attribute first"), pytest.warns(UserWarning, match="suspended"):
        calibrate(model, batches, QuantizationModifier(scheme="FP8"), targets="Linear", pipeline=None)


@pytest.mark.parametrize("cls", [cls for cls in REFUSED if cls is not models.KeepsWhatALayerReturned])
def test_suspended_forwards_take_its_place(cls: type[models.Stateful]) -> None:
    """What is kept is kept before the first layer, which all batches come to in order."""
    torch.manual_seed(0)
    model, batches = cls(), [batch(3), batch(4), batch(2)]
    found = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="its own forwards are suspended"):
        calibrate(found, batches, QuantizationModifier(scheme="FP8"), targets="Linear", pipeline=None)
    seen: dict[str, list[torch.Tensor]] = {}
    again = copy.deepcopy(found)
    for name, value in cls.settings.items():
        setattr(again, name, value() if callable(value) else value)
    for name, layer in again.layers.named_children():
        layer.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0]))
    with torch.no_grad():
        for each in batches:
            again(**each)
    for name, layer in again.layers.named_children():
        largest = max(inputs.abs().max() for inputs in seen[name][-len(batches) :])
        torch.testing.assert_close(layer.input_scale.squeeze() * 448, largest, msg=name)


def assert_unchanged(model: models.Stateful, fresh: models.Stateful) -> None:
    for name, value in fresh.settings.items():
        expected = value() if callable(value) else value
        if isinstance(expected, torch.Tensor):
            assert torch.equal(getattr(model, name), expected)
        else:
            assert getattr(model, name) == expected


@pytest.mark.parametrize("meta", [False, True])
def test_the_line_and_the_module_are_named(meta: bool) -> None:
    model = models.Outer().to("meta" if meta else "cpu")
    with pytest.raises(TraceError, match=r"'c' of inner \(AddsOne\),\n  changed at .*: self.c = self.c \+ 1") as caught:
        trace(model, {"x": torch.ones(3, 4, device="meta" if meta else "cpu")}, "Linear")
    location = caught.value.location
    assert location is not None and location.module == "inner" and location.function == "prepared"
    lines, first = inspect.getsourcelines(models.AddsOne.prepared)
    assert location.line == first + 1 and location.text == lines[1].strip()


KEPT = (
    models.LeavesPositions,
    models.GrowsTable,
    models.MakesOnce,
    models.SetsFrequencies,
    models.CollectsAnew,
    models.LeavesNoise,
)


@pytest.mark.parametrize("targets", ["Linear", ["layers.1"]])
@pytest.mark.parametrize("cls", KEPT)
def test_what_nobody_reads_is_traced(cls: type[models.Stateful], targets: str) -> None:
    model = cls().requires_grad_(False)
    parts, eager = partition(trace(model, batch(3), targets)), copy.deepcopy(model)
    for rows in (3, 5, 2, 8):
        results = []
        for run in (lambda b: eager(**b), parts.run):
            torch.manual_seed(rows)
            results.append(run(batch(rows)))
        assert torch.equal(*results)
    assert parts.variants.retraces == 0


def test_a_method_that_keeps_state_can_be_wrapped() -> None:
    model = models.CountsInMethod().requires_grad_(False)
    eager = copy.deepcopy(model)
    with pytest.raises(TraceError, match="'calls' of the model"):
        trace(model, batch(3), "Linear")
    with wrapped(models.CountsInMethod.counted):
        parts = partition(trace(model, batch(3), "Linear"))
    assert model.calls == 0
    for rows in (3, 5, 2):
        assert torch.equal(parts.run(batch(rows)), eager(**batch(rows)))
    assert model.calls == 3 and torch.equal(model.c, eager.c)


@pytest.mark.parametrize("start", [True, False])
def test_what_is_put_on_a_layer_is_put_there_for_each_batch(start: bool) -> None:
    model = models.PutsStateOnLayers().requires_grad_(False)
    eager = copy.deepcopy(model)
    given = [{**batch(rows), "start": start} for rows in (3, 5, 2)]
    parts = partition(trace(model, given[0], ["re:.*linear"]))
    assert len(parts) == 3
    for each in given:
        assert torch.equal(parts.run(each), eager(**each))
    assert all(isinstance(block.scan.state, torch.Tensor) and block.scan.scale == 2.0 for block in model.blocks)


def test_models_that_keep_nothing_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Plain(models.Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.layers[1](self.layers[0](x))

    trace(Plain(), batch(3), "Linear")
    assert len(calls) == 1


def test_what_layers_hold_as_well_is_not_changed() -> None:
    class Layer(nn.Module):
        def __init__(self, config: dict[str, float]) -> None:
            super().__init__()
            self.inner, self.config = nn.Linear(4, 4), config

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.config["scale"]

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"scale": 1.0}
            self.layers = nn.ModuleList([Layer(self.config) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.config["scale"] = 2.0
            return self.layers[1](self.layers[0](x))

    model = Configured()
    with pytest.raises(TraceError, match=r"changes what modules that it calls hold as well: 'config' of the model"):
        trace(model, batch(3), "Layer")
    assert model.config == {"scale": 1.0}


def test_lists_lose_what_a_trace_has_put_in() -> None:
    class Appends(models.Layers):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []
            self.names: set[str] = set()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            self.names.add("x")
            return self.layers[1](self.layers[0](x))

    model: nn.Module = Appends()
    with pytest.raises(TraceError, match="'seen' of the model"):
        trace(model, batch(3), "Linear")
    assert model.seen == [] and model.names == set()
