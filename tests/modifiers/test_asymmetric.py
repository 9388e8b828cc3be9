"""GPTQ for the outputs that modules have in the original model, on their inputs in the compressed one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from torch import Tensor, nn

import fxcalib
from fxcalib import GPTQModifier, calibrate, partition, trace
from fxcalib.errors import OptionError
from fxcalib.math.gptq import corrected, factorize
from fxcalib.math.hessian import Hessian, InputShift
from fxcalib.math.pruning import SquareSums
from fxcalib.math.ranges import MinMax
from fxcalib.planning import make_plan
from fxcalib.programs import TracedProgram

GPTQ = {"scheme": "W4A16", "group_size": 32}


def batches(count: int = 3, *, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(3, 128, (2, 20 + i), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, -3:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_the_corrected_weight_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x_NI, w_OI = torch.randn(300, 24) * torch.linspace(0.3, 2, 24), torch.randn(16, 24)
    y_NI = x_NI + 0.1 * torch.randn(300, 24)
    hessian, shift = Hessian(24, torch.device("cpu")), InputShift(24, torch.device("cpu"))
    for x, y in zip(x_NI.split(100), y_NI.split(100), strict=True):
        hessian.add(x.reshape(2, 50, 24))
        shift.add(x.reshape(2, 50, 24), y.reshape(2, 50, 24))
    expected = torch.linalg.lstsq(x_NI.double(), y_NI.double() @ w_OI.double().T).solution.T
    for order in ("given", "activation"):
        found = corrected(w_OI, factorize(hessian.full(), 0.0, order), shift.sum_II)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_later_layers_make_up_for_earlier_ones() -> None:
    torch.manual_seed(0)
    model = TwoLayers().requires_grad_(False)
    data = [{"x": torch.randn(2, 150, 32)} for _ in range(4)]
    found = {}
    for asymmetric in (False, True):
        found[asymmetric] = copy.deepcopy(model)
        modifier = GPTQModifier(scheme="W4A16", group_size=32, asymmetric=asymmetric)
        report = calibrate(found[asymmetric], data, modifier, targets="Linear")
        assert all(not module.notes for module in report.modules)
    assert torch.equal(found[False].layers[0].weight, found[True].layers[0].weight), "both are fed the same"
    x = torch.cat([batch["x"] for batch in data])
    inputs, originals = found[True].layers[0](x).tanh(), model.layers[0](x).tanh()
    wanted = originals @ model.layers[1].weight.T
    errors = {k: (inputs @ each.layers[1].weight.T - wanted).square().sum() for k, each in found.items()}
    assert errors[True] < 0.95 * errors[False]


@pytest.mark.parametrize("padded", [False, True])
def test_every_pipeline_finds_the_same(padded: bool) -> None:
    results = []
    for options in (
        {"pipeline": "sequential", "offload": "none"},
        {"pipeline": "sequential", "offload": "cpu"},
        {"pipeline": "layer_sequential"},
        {"pipeline": "layer_sequential", "suspended": True},
    ):
        model = tiny_llama()
        arguments: dict[str, Any] = {"device": "cpu", "targets": "LlamaDecoderLayer", **options}
        calibrate(model, batches(padded=padded), GPTQModifier(asymmetric=True, ignore=["lm_head"], **GPTQ), **arguments)
        results.append(weights(model))
    assert all(torch.equal(result, results[0]) for result in results)
    symmetric = tiny_llama()
    calibrate(symmetric, batches(padded=padded), GPTQModifier(ignore=["lm_head"], **GPTQ), device="cpu")
    assert not torch.equal(weights(symmetric), results[0])


def test_without_propagation_both_models_are_the_same() -> None:
    found = []
    for asymmetric in (False, True):
        model = tiny_llama()
        calibrate(model, batches(), GPTQModifier(asymmetric=asymmetric, **GPTQ), propagate_error=False)
        found.append(weights(model))
    assert torch.equal(*found)


def test_the_plan_says_where_the_original_values_pass() -> None:
    model = tiny_llama()
    modifier = GPTQModifier(asymmetric=True, **GPTQ)
    modifier.attach(model)
    program = TracedProgram(partition(trace(model, batches(1)[0])))
    plan = make_plan(program.parts(0), [modifier.needs], program.inputs(0))
    first, second = (step for step in plan.steps if step.kind == "calibrate")
    (propagate,) = (step for step in plan.steps if step.kind == "propagate")
    assert first.originals is not None and first.originals.observed and first.originals.writes == propagate.writes
    assert second.originals is not None and second.originals.writes == (), "nothing reads them any more"
    assert set(second.originals.frees) == set(second.reads)
    assert f"originals first, observed  writes {', '.join(propagate.writes)}  frees" in str(plan)
    assert all(step.originals is None for step in plan.steps if step.kind != "calibrate")


OTHERS: dict[str, Any] = {
    "QuantizationModifier": {"scheme": "FP8"},
    "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4"},
    "WandaModifier": {"sparsity": 0.5, "mask_structure": "2:4"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_collect_is_of_the_compressed_model_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original model's values pass through the layers that they observe, too, but are not for them."""
    counts = []
    for asymmetric in (False, True):
        counts.append(0)
        for kind in (Hessian, MinMax, SquareSums):

            def counted(self: Any, *args: Any, original: Any = kind.add) -> None:
                counts[-1] += 1
                original(self, *args)

            monkeypatch.setattr(kind, "add", counted)
        other = getattr(fxcalib, name)(targets="re:.*mlp.*", **OTHERS[name])
        gptq = GPTQModifier(targets="re:.*attn.*", asymmetric=asymmetric, **GPTQ)
        calibrate(tiny_llama(), batches(2), [other, gptq])
        monkeypatch.undo()
    assert counts[0] == counts[1] > 0


def test_what_is_no_switch_is_refused() -> None:
    with pytest.raises(OptionError, match="asymmetric is 1; give True or False"):
        GPTQModifier(asymmetric=1, **GPTQ)  # type: ignore[arg-type]
