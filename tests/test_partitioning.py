from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from batches import assert_identical, token_batch
from eager import eager_in_step
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from torch import nn

from fxcalib import QuantizationModifier, calibrate, partition, trace
from fxcalib.errors import OptionError
from fxcalib.tracing import TraceError

SHAPES = [(2, 8, 0, 0), (3, 13, 4, 0), (1, 5, 0, 0), (4, 9, 2, 3), (1, 1, 0, 0), (2, 16, 0, 7)]


@pytest.mark.parametrize("first", SHAPES[:3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {}, {"output_hidden_states": True, "use_cache": False}])
def test_run_equals_the_model(first: tuple[int, ...], attention: str, options: dict[str, Any]) -> None:
    model = tiny_llama(attn_implementation=attention)

    def batch(rows: int, length: int, left: int, right: int) -> dict[str, Any]:
        return token_batch(rows, length, seed=rows, left=left, right=right, **options)

    parts = partition(trace(model, batch(*first)))
    with torch.no_grad():
        for shape in SHAPES:
            assert_identical(parts.run(batch(*shape)), model(**batch(*shape)))


def test_subgraphs_of_a_llama() -> None:
    model = tiny_llama()
    parts = partition(trace(model, token_batch(2, 8, use_cache=False)))
    assert [s.targets for s in parts] == [("model.layers.0",), ("model.layers.1",), ()]
    assert parts[0].modules == (model.model.embed_tokens, model.model.rotary_emb, model.model.layers[0])
    assert parts[2].modules == (model.model.norm, model.lm_head)
    assert parts[0].frees == ("input_ids", "attention_mask")
    assert "model_layers_0" in parts[0].outputs
    assert "model_layers_0" in parts[1].frees
    hidden = parts[0].values["model_layers_0"]
    assert str(hidden) == "model_layers_0: float32[batch, sequence, 64]"
    assert str(hidden.bytes) == "256*batch*sequence"
    # the hidden states, and one rotary table of cosines and one of sines that all rows share
    assert parts[0].bytes(batch=4, sequence=32) == 4 * 32 * 64 * 4 + 2 * 32 * 16 * 4
    assert "subgraph 1: model.layers.1" in str(parts)


def test_masks_are_recomputed_and_not_stored() -> None:
    parts = partition(trace(tiny_llama(), token_batch(2, 8, left=2, use_cache=False)))
    for subgraph in parts:
        stored = [subgraph.values[name] for name in subgraph.outputs]
        assert not [v for v in stored if v.shape is not None and sum(str(size) == "sequence" for size in v.shape) > 1]


def test_several_targets_in_a_subgraph() -> None:
    model = tiny_llama(num_hidden_layers=5)
    parts = partition(trace(model, token_batch(2, 8, use_cache=False)), targets_per_subgraph=2)
    assert [len(s.targets) for s in parts] == [2, 2, 1, 0]
    batch = token_batch(3, 7, left=2, use_cache=False)
    with torch.no_grad():
        assert_identical(parts.run(batch), model(**batch))


def test_zero_targets_in_a_subgraph_is_refused() -> None:
    traced = trace(tiny_llama(), token_batch(1, 4, use_cache=False))
    with pytest.raises(OptionError, match="targets_per_subgraph must be at least 1, not 0"):
        partition(traced, 0)


def test_a_target_that_is_never_called_is_an_error() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Bilinear(2, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(TraceError, match="reached none of the sequential targets Bilinear"):
        partition(trace(Lazy(), {"x": torch.ones(1, 2)}, ["Bilinear"]))


def test_a_batch_that_breaks_a_guard_is_traced_again() -> None:
    parts = partition(trace(tiny_llama(), token_batch(2, 8, use_cache=False)))
    for length in (8, 11, 23):
        parts.run(token_batch(2, length, use_cache=False))
    assert parts.variants.retraces == 0
    parts.run(token_batch(2, 8, left=1, use_cache=False))
    parts.run(token_batch(3, 9, left=1, use_cache=False))
    assert parts.variants.retraces == 1
    parts.run(token_batch(3, 9))
    assert parts.variants.retraces == 2


class RandomGlue(nn.Module):
    """A random graph of linear layers and of glue: `program` says which operation reads which earlier values."""

    def __init__(self, program: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList([nn.Linear(4, 4) for op, _, _ in program if op == 0])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, layers = [x, y], iter(self.layers)
        for op, a, b in self.program:
            left, right = values[a % len(values)], values[b % len(values)]
            if op == 0:
                values.append(next(layers)(left))
            elif op == 1:
                values.append(left + right * 0.5)
            elif op == 2:
                values.append(torch.cat([left, right], 0)[: left.shape[0]])
            elif op == 3:
                values.append(left.clone().mul_(right))
            elif op == 4 and len(values) > 2 and left is not x and left is not y:
                left.add_(1)
            else:
                values.append(left.unsqueeze(1).transpose(0, 1)[0])
        return tuple(values[-3:])


@settings(max_examples=25, deadline=None)
@given(
    program=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=14),
    per=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_random_graphs_run_as_their_models(program: list[tuple[int, int, int]], per: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = RandomGlue([(0, 0, 0), *program])

    def batch(rows: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(rows, 4), "y": torch.randn(rows, 4)}

    parts = partition(trace(model, batch(3), ["Linear"]), per)
    for rows in (3, 1, 6):
        made = batch(rows)
        with torch.no_grad():
            expected = model(**{k: v.clone() for k, v in made.items()})
            assert_identical(parts.run(made), expected)
    freed = [name for subgraph in parts for name in subgraph.frees]
    assert len(freed) == len(set(freed))


@settings(max_examples=10, deadline=None)
@given(
    program=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=10),
    seed=st.integers(0, 3),
)
def test_random_graphs_calibrate_as_their_own_forwards_in_step(program: list[tuple[int, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = RandomGlue([(0, 0, 0), *program])
    hung, walked = copy.deepcopy(model), copy.deepcopy(model)
    batches = [{"x": torch.randn(rows, 4), "y": torch.randn(rows, 4)} for rows in (3, 5)]
    eager_in_step(walked, batches, QuantizationModifier(scheme="FP8"), "Linear")
    calibrate(model, copy.deepcopy(batches), QuantizationModifier(scheme="FP8"), targets="Linear", device="cpu")
    options: dict[str, Any] = {"pipeline": "layer_sequential", "suspended": True, "targets": "Linear", "device": "cpu"}
    calibrate(hung, copy.deepcopy(batches), QuantizationModifier(scheme="FP8"), **options)
    assert_identical(dict(model.state_dict()), dict(walked.state_dict()))
    assert_identical(dict(hung.state_dict()), dict(walked.state_dict()))
