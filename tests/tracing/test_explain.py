"""The explanation of a failing trace, its parts and its text, and of a trace that succeeds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import glue_functions as glue
import numpy as np
import pytest
import torch
from batches import state_of, token_batch
from glue_functions import Layers, positions
from tiny_llama import tiny_llama
from torch import nn

import fxcalib
from fxcalib import Explanation, explain, wrapped
from fxcalib.errors import TargetError


class Outer(nn.Module):
    """The failing line is in a function that a submodule calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.inner(self.head(x), mask=mask)


class InTheForward(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = torch.from_numpy(np.cumsum(mask.numpy(), -1))
        return self.layers[1](self.layers[0](x) + places[..., None])


class Raising(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise ValueError("out of cheese")


class Chance(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x) * random.random())


class Branching(Layers):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if mask.any():
            x = -x
        return self.layers[1](x)


def batch() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.int64)}


def test_everything_about_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    model = Outer(Layers(positions))
    before, code = state_of(model), positions.__code__
    found = explain(model, batch())
    assert isinstance(found, Explanation)
    assert not found.traced
    assert found.kind == "data that leaves torch"
    assert found.reason == "RuntimeError: .numpy() is not supported for tensor subclasses."
    assert found.location is not None
    assert found.location.file == glue.__file__
    assert found.location.function == "positions"
    assert found.location.text == "return torch.from_numpy(np.cumsum(mask.numpy(), -1))"
    assert found.location.importable == "glue_functions:positions"
    assert [call.function for call in found.calls] == ["forward", "forward", "between", "positions"]
    assert [call.module for call in found.calls] == ["", "inner", "inner", ""]
    assert found.values == ("mask: int64[batch, sequence]",)
    assert found.module == "inner"
    assert found.patch == "import fxcalib\nfrom glue_functions import positions\n\nfxcalib.wrap(positions)"
    assert found.patch_suffices
    text = str(found)
    assert "Outer cannot be traced: data that leaves torch\n" in text
    assert f"  at glue_functions.py:{found.location.line} in positions: return torch.from_numpy(" in text
    assert "run this before the trace; with it, the model traces:\n    import fxcalib\n" in text
    assert "fxcalib quantize MODEL --pipeline layer_sequential --suspended" in text
    assert positions.__code__ is code
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found.to_dict()["calls"][-1]["function"] == "positions"


def test_the_patch_works_when_it_is_pasted() -> None:
    model = Outer(Layers(positions))
    found = explain(model, batch())
    assert found.patch is not None
    with wrapped():
        exec(found.patch, {})
        try:
            again = explain(model, batch())
        finally:
            from fxcalib.tracing import patching

            patching._WRAPPED.clear()
    assert again.traced
    assert again.exact


def test_a_line_in_a_forward_is_to_be_moved() -> None:
    found = explain(Outer(InTheForward()), batch())
    assert found.patch is None
    assert "move the line into a function of its own that calls no module" in str(found)
    assert found.module == "inner"


def test_an_error_of_the_model_itself_is_told_apart() -> None:
    found = explain(Raising(), batch())
    assert found.kind == "the model itself fails on this batch"
    assert "ValueError: out of cheese" in found.reason
    assert "suspended" not in str(found)


def test_a_branch_on_data_needs_weights() -> None:
    model = Branching().to("meta")
    found = explain(model, {name: tensor.to("meta") for name, tensor in batch().items()})
    assert found.kind == "data-dependent branch"
    assert "trace with weights and a real batch" in str(found)
    assert found.module is None


@pytest.mark.parametrize("model", [Layers(lambda mask: mask), Branching()])
def test_a_trace_is_held_against_the_model(model: nn.Module) -> None:
    found = explain(model, batch())
    assert found.traced
    assert found.exact
    assert "bit for bit" in str(found)


def test_assumptions_are_listed_with_their_lines() -> None:
    found = explain(tiny_llama(), token_batch(2, 8, use_cache=False))
    assert found.exact
    assert "[constant] use_cache == False" in str(found)
    assert "masking_utils.py" in str(found)
    skeleton = explain(tiny_llama().to("meta"), token_batch(2, 8, use_cache=False))
    assert skeleton.traced
    assert skeleton.exact is None
    assert "not compared with the model" in str(skeleton)


def test_what_torch_does_not_see_is_found_out() -> None:
    model = Chance()
    random.seed(1)
    state = random.getstate()
    found = explain(model, batch())
    assert found.traced
    assert found.exact is False
    assert "NOT EXACT" in str(found)
    assert "the result differs in 24 of 24 elements" in str(found)
    assert random.getstate() == state


def test_unknown_targets_are_an_error() -> None:
    with pytest.raises(TargetError, match="did you mean 'Linear'"):
        explain(Branching(), batch(), "Liner")


def test_the_error_of_a_trace_holds_the_same() -> None:
    with pytest.raises(fxcalib.TraceError) as caught:
        fxcalib.trace(Layers(positions), batch())
    error = caught.value
    assert error.kind == "data that leaves torch"
    assert error.location is not None
    assert error.location.function == "positions"
    assert error.values == ("mask: int64[batch, sequence]",)
    assert "fxcalib quantize --pipeline layer_sequential --suspended" in str(error)


def two_steps(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(glue.array(mask) + np.cumsum(np.asarray(mask), -1))


def in_numpy(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([mask, mask]).sum(0))


@pytest.mark.parametrize("function", [two_steps, in_numpy])
def test_the_function_to_wrap_returns_tensors(function: Any) -> None:
    found = explain(Layers(function), batch())
    assert found.patch is not None
    assert found.patch.splitlines()[-1] == f"fxcalib.wrap({function.__name__})"
    assert found.patch_suffices
    assert found.location is not None
    assert found.location.file in (__file__, glue.__file__)
