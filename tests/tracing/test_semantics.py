"""What a forward may do with Python and torch, and tracing has to keep: outputs are the model's, on every batch."""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import semantic_models as models
import torch
import torch._functorch.apis as functorch_apis
import torch._functorch.vmap as functorch_vmap
from batches import assert_identical
from semantic_models import Pair, Prompt, Span
from torch import nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._subclasses import FakeTensor
from transformers import masking_utils
from transformers.utils import import_utils

import tracing_patches
from fxcalib import partition, trace, wrapped
from fxcalib.partitioning import Partition
from fxcalib.tracing import TraceError
from fxcalib.tracing.patching import _found

Batch = dict[str, Any]


def noise(*shape: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


def rows(*names: str, width: int = 4) -> Callable[..., Batch]:
    """Batches of (count, width) float32 under each name."""
    return lambda count, shift=0.0: {
        name: noise(count, width, seed=count + i, shift=shift) for i, name in enumerate(names)
    }


def prompt(count: int, length: int, nothing: bool = True) -> Batch:
    spans = [Span(noise(count, seed=i), {"w": noise(4, seed=i)}, "ab"[:i]) for i in range(2)]
    nested = [{"key": [noise(count, 4), noise(4, seed=1), noise(count, 1)], "k": (noise(1, 4),)}]
    named = Pair(noise(count, 4, seed=5), {"deep": [noise(4, seed=6)]})
    more = {"nothing": None if nothing else noise(count, 4, seed=7)}
    return {"prompt": Prompt(noise(count, 4, seed=length), spans, 0.5), "nested": nested, "named": named, **more}


x = rows("x")
NAMES = ("input", "id", "type", "filter", "torch", "F", "module", "original", "model", "batch", "args", "kwargs")
HIDING = rows(*NAMES, "output", "getattr", "m", "f")

CASES: dict[str, tuple[Callable[[], nn.Module], list[Batch], str | list[str]]] = {
    "views": (models.WritesThroughViews, [x(3), x(5), x(1)], "Linear"),
    "indexed writes": (models.WritesIndexed, [x(3), x(6)], "Linear"),
    "+=": (models.WritesAugmented, [rows("x", "y")(n) for n in (3, 2, 7)], "Linear"),
    "out=": (models.WritesOut, [x(3), x(5)], "Linear"),
    "writes between targets": (models.WritesBetweenTargets, [x(3), x(5)], "Marking"),
    "writes in targets": (models.WritesBetweenTargets, [x(2), x(5)], "Linear"),
    "branches on writes": (models.WritesThenBranches, [x(3, s) for s in (5, -5, 0)] + [x(5, 2), x(2, -2)], "Linear"),
    "asks what it writes": (
        models.WritesAsked,
        [{**x(n), "flag": torch.tensor(f)} for n, f in ((3, True), (3, False), (5, True))],
        "Linear",
    ),
    "buffers of layers": (models.WritesBuffer, [x(3, s) for s in (5, -5, 0)] + [x(5)], "Counting"),
    "buffers": (models.WritesBuffer, [x(3, s) for s in (5, -5, 0)] + [x(5)], "Linear"),
    "buffers of layers, read": (models.ReadsBuffersOfLayers, [x(3), x(5), x(1)], "Stepping"),
    **{
        f"returns {kind}": (lambda kind=kind: models.Returns(kind), [x(3), x(5), x(1)], "Linear")
        for kind in ("ModelOutput", "named tuple", "dataclass", "nested", "size", "namespace", "cache", "aliases")
    },
    "called twice": (models.CalledTwice, [x(3), x(5)], "Scaling"),
    "called twice, inner": (models.CalledTwice, [x(3), x(5)], "Linear"),
    "tied": (models.Tied, [{"ids": torch.arange(n).reshape(2, -1)} for n in (4, 8, 2)], "Linear"),
    "tied, by name": (models.Tied, [{"ids": torch.arange(n)[None]} for n in (4, 8)], ["layers.0", "twin"]),
    "early return": (
        models.ReturnsEarly,
        [{**x(n), "limit": torch.tensor(limit)} for n in (3, 1, 5) for limit in (9.0, 0.1, -9.0, 0.8)],
        "Linear",
    ),
    "loops over sizes": (
        models.LoopsOverSizes,
        [{"x": noise(*s, 4)} for s in ((3, 6), (2, 5), (1, 2), (4, 11))],
        "Linear",
    ),
    "names": (models.NamedLikeGlobals, [HIDING(3), HIDING(5)], "Inner"),
    "names, inner": (models.NamedLikeGlobals, [HIDING(3), HIDING(5)], "Linear"),
    "super()": (models.Derived, [x(3), x(5), {**x(3), "scale": 0.5}], "Linear"),
    "decorators": (
        models.Decorated,
        [
            rows("x", "offset")(3),
            rows("x", "offset")(5),
            {**rows("x", "offset")(4), "factor": 0.5, "as_tuple": True, "power": 3},
        ],
        "DecoratedLayer",
    ),
    "decorated ancestors": (models.Decorated, [rows("x", "offset")(n) for n in (3, 5)], "Linear"),
    "objects": (models.TakesObjects, [prompt(3, 1), prompt(5, 2), prompt(2, 3, False), prompt(1, 1)], "Linear"),
    "constants": (
        models.TakesConstants,
        [{"ids": torch.arange(4 * n).reshape(n, 4), "scale": s} for s in (1, 1.0, True, 0.0, -0.0) for n in (2, 3)],
        "Linear",
    ),
    "objects, whole": (models.TakesObjects, [prompt(3, 1), prompt(5, 2), prompt(2, 3, False)], "Spanning"),
    "*args": (models.TakesAnything, [rows("x", "b", "a")(n) for n in (3, 5)], "Middle"),
    "*args, inner": (models.TakesAnything, [rows("x", "b", "a")(n) for n in (3, 5)], "Linear"),
    **{
        f"conditions, deep={deep}": (
            lambda deep=deep: models.Conditional(deep),
            [
                {"x": noise(n, m, 4, shift=s), "choose": c}
                for n, m, s, c in ((2, 5, 0, "none"), (3, 7, 0, "4"), (2, 2, 9, "4"))
            ],
            "Linear",
        )
        for deep in (True, False)
    },
    "memoized": (models.Memoizing, [x(3), x(5)], "Linear"),
    "layers alike": (models.Alike, [x(3), x(5)], "Layer"),
    "comprehensions": (models.Comprehending, [x(3), x(5)], "Linear"),
}


def run(model: nn.Module | Partition, batch: Batch) -> tuple[Any, Batch]:
    """What `model` returns on a copy of `batch`, and what has become of that."""
    given = copy.deepcopy(batch)
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**given) if isinstance(model, nn.Module) else model.run(given), given


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_model(name: str) -> None:
    make, batches, targets = CASES[name]
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    twin = copy.deepcopy(model)
    for first in (0, 1):
        model.load_state_dict(twin.state_dict())
        eager = copy.deepcopy(twin)
        parts = partition(trace(model, copy.deepcopy(batches[first]), targets))
        for batch in batches:
            expected, theirs = run(eager, batch)
            actual, ours = run(parts, batch)
            assert_identical(actual, expected)
            assert_identical(ours, theirs)
        assert_identical(dict(model.state_dict()), dict(eager.state_dict()))


def test_what_was_written_before_a_run_is_given_up_is_written_once() -> None:
    model = models.WritesThenDiffers().requires_grad_(False)
    parts, eager = partition(trace(model, x(3), "Selecting")), copy.deepcopy(model)
    for retraces, columns in ((0, 4), (1, 3)):  # the trace expects 4 columns
        model.layers[0].columns = eager.layers[0].columns = columns
        expected, theirs = run(eager, x(5))
        actual, ours = run(parts, x(5))
        assert_identical((actual, ours, model.total), (expected, theirs, eager.total))
        assert parts.variants.retraces == retraces


def test_not_a_number_is_a_constant_like_any_other() -> None:
    model = models.TakesConstants().requires_grad_(False)
    batch = {"ids": torch.ones(2, 4), "scale": float("nan")}
    parts = partition(trace(model, batch, "Linear"))
    assert parts.run(batch)[1].isnan().all()
    assert parts.variants.retraces == 0


def test_the_same_tensor_in_two_places_is_the_same_tensor() -> None:
    parts = partition(trace(models.Returns("aliases"), x(3), "Linear"))
    _, layer, first, _, again = parts.run(x(5))
    assert first is again
    assert layer is parts.traced.model.layers[0]


def test_a_target_that_is_called_often_has_a_subgraph_for_each_call() -> None:
    parts = partition(trace(models.CalledTwice(), x(3), "Scaling"))
    assert [subgraph.targets for subgraph in parts] == [("block",)] * 4 + [("last",)]
    tied = partition(trace(models.Tied(), {"ids": torch.arange(4)[None]}, "Linear"))
    called = ["layers.0", "layers.1", "layers.0", "layers.1", "twin", "head"]
    assert [subgraph.targets for subgraph in tied] == [(name,) for name in called]


@pytest.mark.parametrize("layers", [3, 8])
def test_layers_that_differ_in_their_index_alone_are_looked_into_once(layers: int) -> None:
    entered = []

    class Layer(nn.Module):
        def __init__(self, layer_idx: int) -> None:
            super().__init__()
            self.inner, self.layer_idx = nn.Linear(16, 16), layer_idx

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            entered.append(self.layer_idx)
            return self.inner(input)

    model = nn.Sequential(nn.Linear(4, 16), *[Layer(i) for i in range(1, layers)])
    trace(model, {"input": torch.ones(2, 4)}, "Layer")
    assert entered == [1]


@pytest.mark.parametrize("before", [False, True])
def test_memoized_functions_keep_no_fake_tensors(before: bool) -> None:
    models.table.cache_clear()
    if before:
        models.table(4)
    trace(models.Memoizing(), x(3), "Linear")
    assert type(models.table(4)) is torch.Tensor


def test_targets_are_called_with_their_own_signature() -> None:
    class Inspecting(models.Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(**{name: x for name in inspect.signature(layer.forward).parameters})
            return x

    model = Inspecting().requires_grad_(False)
    parts = partition(trace(model, x(3), "Linear"))
    assert torch.equal(parts.run(x(5)), model(**x(5)))


def everything_global() -> dict[str, Any]:
    """What a trace or a run could leave changed outside of the model."""
    classes = (nn.Module, nn.Linear, models.Raising, models.Raising.Checked, torch.Tensor, FakeTensor)
    spaces = (torch, torch.nn.functional, functorch_apis, functorch_vmap, import_utils, masking_utils, models)
    patched = [_found(p.function) if isinstance(p.function, str) else p.function for p in tracing_patches.PATCHES]
    numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    return {
        **{f"{space.__name__}.{name}": id(value) for space in spaces for name, value in vars(space).items()},
        **{f"{cls.__name__}.{name}": id(value) for cls in classes for name, value in vars(cls).items()},
        "code": [(f.__code__, f.__kwdefaults__, f.__globals__.get(f.__name__) is f) for f in patched if f is not None],
        "modes": (_len_torch_dispatch_stack(), _len_torch_function_stack(), torch.is_grad_enabled()),
        "numbers": numbers,
        "settings": (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")),
        "hooks": [len(hooks) for hooks in vars(torch.nn.modules.module).values() if isinstance(hooks, OrderedDict)],
        "log": logging.getLogger("torch._subclasses.fake_tensor").level,
    }


def of_model(model: nn.Module) -> dict[str, Any]:
    held = {f"{name}.{key}": id(value) for name, module in model.named_modules() for key, value in vars(module).items()}
    groups = {f"{name}.{g}": list(vars(m)[g]) for name, m in model.named_modules() for g in ("_parameters", "_buffers")}
    tensors = {name: (id(t), t.tolist()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {**held, **groups, **tensors, "notes": dict(model.notes)}


@pytest.mark.parametrize("where", ["glue", "layer", "nowhere"])
@pytest.mark.parametrize("wrapping", [False, True])
def test_a_trace_leaves_nothing_behind_if_the_forward_raises(where: str, wrapping: bool) -> None:
    model = models.Raising()
    model.raises, model.layers[1].inner.raises = where == "glue", where == "layer"
    before, own, code = everything_global(), of_model(model), models.residual.__code__
    with wrapped(models.residual) if wrapping else nullcontext():
        if where == "nowhere":
            trace(model, x(3), "Checked")
        else:
            with pytest.raises(TraceError, match="out of cheese"):
                trace(model, x(3), "Checked")
    assert everything_global() == before
    assert of_model(model) == own
    assert models.residual.__code__ is code


@pytest.mark.parametrize("where", ["glue", "layer"])
def test_a_run_leaves_what_the_model_leaves_if_it_raises(where: str) -> None:
    model = models.Raising().requires_grad_(False)
    parts = partition(trace(model, x(3), "Checked"))
    if where == "glue":
        batch = {"x": torch.ones(3, 5)}  # fits no weight: traced anew, in vain
    else:
        batch, model.layers[1].inner.raises = x(3), True
    eager = copy.deepcopy(model)
    before, own = everything_global(), of_model(model)
    with pytest.raises((RuntimeError, TraceError)):
        parts.run(batch)
    after, drawn = everything_global(), torch.get_rng_state()
    assert {k: v for k, v in after.items() if k != "numbers"} == {k: v for k, v in before.items() if k != "numbers"}
    torch.set_rng_state(torch.tensor(before["numbers"][0], dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        eager(**batch)
    assert torch.equal(drawn, torch.get_rng_state()) or where == "glue"
    if where == "glue":
        assert after == before
        assert of_model(model) == own
    model.layers[1].inner.raises = False
    model.total.zero_()
    fresh = copy.deepcopy(model)
    torch.manual_seed(0)
    expected = fresh(**x(5))
    torch.manual_seed(0)
    assert torch.equal(parts.run(x(5)), expected)
