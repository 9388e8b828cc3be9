"""Weights that engines stack have one global scale in the two-level format."""

from __future__ import annotations

import pytest
import torch
from layerwise import calibrate, scope_of, tiny_llama, token_batches
from torch import nn

import fxcalib
from fxcalib.modifiers import GPTQModifier, QuantizationModifier, Scope
from fxcalib.modifiers.global_scales import FUSED

BATCHES = token_batches()


def global_scales(model: nn.Module, kind: str = "weight") -> dict[str, float]:
    found = {name: getattr(module, f"{kind}_global_scale", None) for name, module in model.named_modules()}
    return {name: scale.item() for name, scale in found.items() if scale is not None}


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_what_engines_stack_has_one_global_scale(kind: type[QuantizationModifier], scheme: str) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    weights = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    calibrate(model, kind(scheme=scheme), BATCHES)
    found = global_scales(model)
    assert len(found) == 14
    groups = [[f"self_attn.{part}_proj" for part in group] for group in ("qkv", "o")]
    for group in (*groups, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]):
        names = [f"model.layers.0.{name}" for name in group]
        largest = max(float(weights[name].abs().max()) for name in names)
        (shared,) = {found[name] for name in names}
        assert shared == pytest.approx(448 * 6 / largest, rel=1e-6)
    if scheme == "NVFP4":
        inputs = global_scales(model, "input")
        assert len({inputs[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv"}) == 1


def test_global_scales_are_shared_across_subgraphs() -> None:
    """With each Linear as a sequential target, q, k and v are committed one after the other."""
    model = tiny_llama(dtype=torch.bfloat16)
    data = [{"input_ids": batch} for batch in BATCHES]
    fxcalib.calibrate(model, data, QuantizationModifier(scheme="NVFP4"), targets="Linear")
    found = global_scales(model)
    assert len({found[f"model.layers.1.self_attn.{part}_proj"] for part in "qkv"}) == 1
    assert found["model.layers.1.mlp.gate_proj"] == found["model.layers.1.mlp.up_proj"]


class Siblings(nn.Module):
    """Modules of names that nobody knows; two of them read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.other = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.left(x) + self.right(x))


def test_siblings_that_read_one_tensor_share_a_global_scale() -> None:
    torch.manual_seed(0)
    model = Siblings().requires_grad_(False)
    model.right.weight.mul_(2)
    model.other.weight.mul_(3)
    modifier = QuantizationModifier(scheme="NVFP4")
    modifier.attach(model)
    scope = scope_of(model, "")
    with modifier.observe(scope):
        model(torch.randn(8, 64, dtype=torch.bfloat16))
    modifier.commit(scope)
    found = global_scales(model)
    assert found["left"] == found["right"] != found["other"]


def test_a_part_that_is_not_loaded_keeps_its_own_global_scale_and_says_so() -> None:
    names = FUSED[0]
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for name in names}).requires_grad_(
        False
    )
    model["v_proj"].to("meta")
    modifier = QuantizationModifier(scheme="NVFP4A16")
    modifier.attach(model)
    first, second = modifier.commit(Scope(model, 0, {name: model[name] for name in ("q_proj", "k_proj")}))
    assert first.notes == ("its global scale is not that of v_proj, which was not loaded yet",)
    assert second.notes == ()
    model["v_proj"].weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16), requires_grad=False)
    modifier.commit(Scope(model, 1, {"v_proj": model["v_proj"]}))
    found = global_scales(model)
    assert found["q_proj"] == found["k_proj"] != found["v_proj"] == 448 * 6


def test_zero_weights_have_a_global_scale() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
    model[0].weight.zero_()
    modifier = QuantizationModifier(scheme="NVFP4A16")
    modifier.attach(model)
    modifier.commit(Scope(model, 0, {"0": model[0]}))
    assert torch.isfinite(model[0].weight_global_scale).all() and not model[0].weight.any()
