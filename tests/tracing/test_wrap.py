"""Wrapped functions are one node, exact for every batch, and untouched outside of a trace."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import glue_functions as glue
import pytest
import torch
from batches import assert_identical
from glue_functions import Layers, Method, Pair, Tools, positions
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import fxcalib
from fxcalib import GPTQModifier, TraceError, partition, trace, wrapped
from fxcalib.errors import OptionError
from fxcalib.partitioning import Partition
from fxcalib.tracing.patching import wrapped_functions


def batch(rows: int = 2, length: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (rows, length), generator=generator)
    return {"x": torch.randn(rows, length, 4, generator=generator), "mask": mask}


def assert_exact(model: nn.Module, parts: Partition, *batches: dict[str, torch.Tensor]) -> None:
    for given in batches:
        copies = [{name: tensor.clone() for name, tensor in given.items()} for _ in range(2)]
        with torch.no_grad():
            assert_identical(parts.run(copies[0]), model(**copies[1]))


def functions_of(parts: Partition) -> list[str]:
    return [node.meta["wrapped"] for node in parts.traced.graph.nodes if "wrapped" in node.meta]


def test_a_wrapped_function_is_one_node_and_exact_for_every_size() -> None:
    model = Layers(positions)
    with pytest.raises(TraceError, match=r"\.numpy\(\) is not supported"):
        trace(model, batch())
    code = positions.__code__
    with wrapped(positions):
        parts = partition(trace(model, batch()))
        assert positions.__code__ is code
        assert functions_of(parts) == ["glue_functions.positions"]
        assert [n.target for n in parts.traced.graph.nodes if "wrapped" in n.meta] == [positions]
        assert_exact(model, parts, batch(), batch(5, 7, 1), batch(1, 1, 2))
        assert parts.variants.retraces == 0
    with pytest.raises(TraceError):
        trace(model, batch())


def test_wrap_returns_the_function_itself_and_lasts() -> None:
    @fxcalib.wrap
    def local(mask: torch.Tensor) -> torch.Tensor:
        return positions(mask)

    try:
        assert local(torch.ones(1, 2, dtype=torch.int64)).tolist() == [[1, 2]]
        assert [patch.function for patch in wrapped_functions()] == [local]
        with wrapped(local):
            pass
        parts = partition(trace(Layers(local), batch()))
        assert len(functions_of(parts)) == 1
    finally:
        from fxcalib.tracing import patching

        patching._WRAPPED.pop(local)


LOGGED = glue.logged(positions)
HOLDERS: dict[str, Callable[..., Any]] = {
    "another module": positions,
    "partial": functools.partial(positions),
    "closure": LOGGED,
    "table": lambda mask, table={"p": positions}: table["p"](mask),
    "name": lambda mask: glue.positions(mask=mask),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_holds_the_function_calls_the_node(holder: str) -> None:
    model = Layers(HOLDERS[holder])
    with wrapped(glue.positions):
        parts = partition(trace(model, batch()))
    assert len(functions_of(parts)) == 1
    assert_exact(model, parts, batch(), batch(3, 5, 1))


@pytest.mark.parametrize(
    ("function", "model"),
    [(Method.between, Method()), (Tools.static, Layers(Tools().static)), (Tools.of_class, Layers(Tools.of_class))],
)
def test_methods(function: Callable[..., Any], model: Layers) -> None:
    with wrapped(function):
        parts = partition(trace(model, batch()))
    assert len(functions_of(parts)) == 1
    assert_exact(model, parts, batch(), batch(4, 6, 1))
    assert not any(isinstance(v, torch.Tensor) for v in vars(model).values())


class Nested(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        pair = Pair(mask.float(), mask + 1)
        found = glue.nested(
            {"both": (mask, [1.0][0])}, scale=0.5, pair=pair, output=BaseModelOutput(last_hidden_state=mask * 2.0)
        )
        assert type(found["pair"]) is Pair
        assert type(found["output"]) is BaseModelOutput
        assert found["none"] is None
        x = self.layers[0](x + found["output"].last_hidden_state[..., None])
        return {"hidden": self.layers[1](x + found["pair"].first[..., None]), "pair": found["pair"]}


def test_containers_come_back_as_what_they_were() -> None:
    model = Nested()
    with wrapped(glue.nested):
        parts = partition(trace(model, batch()))
    assert_exact(model, parts, batch(), batch(3, 2, 1))


class Counted(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, total = glue.counted(mask)
        return self.layers[1](self.layers[0](x) * total + rows[0])


def test_numbers_are_guarded() -> None:
    model = Counted()
    first, same, other = batch(), batch(), batch(seed=3)
    same["x"] = -same["x"]
    with wrapped(glue.counted):
        parts = partition(trace(model, first))
        assert {f"counted_result_{i}" for i in range(3)} == {g.text.split()[0] for g in parts.traced.guards}
        assert all("rows, total = glue.counted(mask)" in guard.source for guard in parts.traced.guards)
        assert_exact(model, parts, first, same)
        assert parts.variants.retraces == 0
        assert_exact(model, parts, other, batch(3, 4))
        assert parts.variants.retraces == 2
        meta = {name: tensor.to("meta") for name, tensor in first.items()}
        with pytest.raises(TraceError, match=r"counted returns .*trace the model with weights and a real batch"):
            trace(model, meta)


class Kept(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = glue.kept(mask)
        return self.layers[1](self.layers[0](x) * places.shape[0])


def test_a_size_that_depends_on_data_is_held_against_every_batch() -> None:
    model = Kept()
    with wrapped(glue.kept):
        parts = partition(trace(model, batch()))
        assert_exact(model, parts, batch(), *(batch(3, 4, seed) for seed in range(4)))


class Writing(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        held = x.clone()
        before = held.sum(-1, keepdim=True)
        glue.zeroed(held)
        after = held.sum(-1, keepdim=True)
        x = self.layers[0](x + before)
        return self.layers[1](x + held - after + before)


def test_writes_to_arguments_keep_their_order() -> None:
    model = Writing()
    with wrapped(glue.zeroed):
        parts = partition(trace(model, batch()))
    assert parts.traced.recording.mutated_by
    assert_exact(model, parts, batch(), batch(4, 2, 1))


class Drawing(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        factor = glue.drawn(mask.float())[..., None]
        return self.layers[1](self.layers[0](x * factor) + factor)


def test_a_wrapped_function_runs_once_for_a_batch() -> None:
    model, given = Drawing(), batch()
    with wrapped(glue.drawn):
        parts = partition(trace(model, given))
    for seed in range(3):
        random.seed(seed)
        actual = parts.run(given)
        random.seed(seed)
        assert torch.equal(actual, model(**given))
    model, calls = Layers(positions), glue.CALLS
    with wrapped(positions):
        parts = partition(trace(model, given))
    calls.clear()
    parts.run(given)
    assert calls == ["positions"]


class Hiding(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.inner(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("targets", [None, ["layers.1"]])
def test_modules_may_not_hide_in_wrapped_functions(targets: list[str] | None) -> None:
    what = "sequential target" if targets is None else "module"
    with wrapped(Hiding.inner), pytest.raises(TraceError, match=rf"Hiding\.inner calls the {what} layers\.0") as caught:
        trace(Hiding(), batch(), targets)
    assert "wrap a smaller function" in str(caught.value)
    assert caught.value.kind == "module in a wrapped function"


def test_a_result_that_no_graph_can_follow_is_refused() -> None:
    with wrapped(glue.array), pytest.raises(TraceError, match=r"array returns a ndarray, which a trace cannot follow"):
        trace(Layers(glue.array), batch())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (torch.from_numpy, "no function written in Python; wrap a function written in Python that calls it"),
        (functools.lru_cache(positions), "a _lru_cache_wrapper is no function"),
        (Layers, "it is a class; name one of its methods"),
        (glue.waits, "it waits between its results"),
        (3, "cannot wrap 3: a int"),
    ],
)
def test_what_cannot_be_wrapped(function: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        fxcalib.wrap(function)
    assert wrapped_functions() == ()


def test_a_failing_trace_leaves_the_function_as_it_was() -> None:
    def broken(mask: torch.Tensor, *, scale: int = 2) -> torch.Tensor:
        raise RuntimeError("out of cheese")

    code, keywords = broken.__code__, broken.__kwdefaults__
    with wrapped(broken), pytest.raises(TraceError, match="out of cheese"):
        trace(Layers(broken), batch())
    assert broken.__code__ is code
    assert broken.__kwdefaults__ is keywords


def test_calibration_is_that_of_suspended_forwards() -> None:
    batches = [batch(2, 3, seed) for seed in range(3)]
    weights = []
    for how in ({}, {"pipeline": "layer_sequential", "suspended": True}):
        model = Layers(positions).requires_grad_(False)
        with wrapped(positions):
            fxcalib.calibrate(
                model, batches, GPTQModifier(scheme="W4A16", group_size=4, ignore=[]), device="cpu", **how
            )
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_dry_run_needs_no_values_of_a_wrapped_function() -> None:
    model = Layers(positions).requires_grad_(False)
    with wrapped(positions):
        parts = partition(trace(model, batch()))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            given = {name: torch.empty_like(tensor) for name, tensor in batch(4, 6).items()}
            bound = parts.traced.bind(given)
            first = parts[0].run(bound.inputs, bound.signature)
            last = parts[1].run({**bound.inputs, **first}, bound.signature)
    assert last["output"][0].shape == (4, 6, 4)


class Selecting(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x * glue.kept(mask).shape[0])  # the size goes into the graph as a number


def test_calibration_over_sizes_that_depend_on_data() -> None:
    masks = [[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]]
    batches = [{"x": torch.randn(3, 3, 4), "mask": torch.tensor(mask)} for mask in masks]
    weights = []
    for how in ({}, {"pipeline": "layer_sequential", "suspended": True}):
        model = Selecting().requires_grad_(False)
        with wrapped(glue.kept):
            fxcalib.calibrate(
                model, batches, GPTQModifier(scheme="W4A16", group_size=4, ignore=[]), device="cpu", **how
            )
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Aliasing(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        held = x * 1.0
        glue.shared(held).add_(1)
        x = self.layers[0](held)
        glue.shared(held).add_(1)
        return self.layers[1](x + held)


def test_a_result_in_the_memory_of_an_argument_is_followed() -> None:
    model = Aliasing()
    with wrapped(glue.shared):
        parts = partition(trace(model, batch()))
    assert_exact(model, parts, batch(), batch(5, 2, 1))
