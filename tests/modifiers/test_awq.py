"""AWQModifier in the pipelines: its search, its clipping, with other modifiers, and its arguments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from batches import token_batch
from tiny_llama import tiny_llama
from torch import Tensor, nn

from fxcalib import AWQMapping, AWQModifier, GPTQModifier, QuantizationModifier
from fxcalib.errors import OptionError
from fxcalib.math.awq import awq_scales, relative_magnitude
from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import minmax_qparams, quantize_
from fxcalib.modifiers import Modifier, ModuleResult, Scope
from fxcalib.modifiers.weights import IMPORTANCE
from fxcalib.pipelines import CalibrationPipeline, Outcome

BATCHES = [token_batch(4, 32, seed=seed, left=5) for seed in range(3)]
GROUP = 32
MLP = [
    {"smooth_layer": "re:.*post_attention_layernorm", "balance_layers": ["re:.*gate_proj", "re:.*up_proj"]},
]


def one_layer() -> Any:
    """A layer whose norms have very different gains, and with biases."""
    model = tiny_llama(num_hidden_layers=1, attention_bias=True)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += torch.randn(parameter.shape, generator=generator)
        elif parameter.dim() == 1:
            parameter.data *= torch.exp(torch.randn(parameter.shape, generator=generator))
    return model


def apply(model: nn.Module, *modifiers: Modifier, batches: Any = None) -> tuple[Any, Outcome]:
    changed = copy.deepcopy(model)
    flow = CalibrationPipeline.from_modifiers(modifiers)
    return changed, flow(changed, BATCHES if batches is None else batches)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def error_of(model: nn.Module, original: nn.Module) -> float:
    return float(sum((logits(model, b) - logits(original, b)).square().mean() for b in BATCHES))


def assert_same_norms(found: nn.Module, expected: nn.Module) -> None:
    for (name, wanted), parameter in zip(expected.named_parameters(), found.parameters(), strict=True):
        if wanted.dim() == 1 and "norm" in name:
            assert torch.allclose(parameter, wanted, rtol=1e-4), name


class Unrounded(QuantizationModifier):
    """Rounds nothing: what is left of a run are the scales."""

    def commit_weights(self, scope: Scope, names: Sequence[str]) -> list[ModuleResult]:
        return [ModuleResult(name, "none", None, "weight", 0.0) for name in names]


def test_outputs_are_unchanged_by_the_scales() -> None:
    model = one_layer()
    scaled, outcome = apply(model, AWQModifier(duo_scaling="both"), Unrounded(scheme="W4A16", group_size=GROUP))
    assert len([r for r in outcome.modules if r.scheme == "scaled for its readers"]) == 4
    mlp = scaled.model.layers[0].mlp
    assert not torch.equal(mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    for batch in BATCHES:
        assert torch.allclose(logits(scaled, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_the_scales_are_those_of_least_error_on_the_data(duo_scaling: Any) -> None:
    """Every candidate by itself, in float64 on the activations."""
    model = one_layer()
    layer = model.model.layers[0]
    seen: list[Tensor] = []
    handle = layer.post_attention_layernorm.register_forward_hook(lambda m, args, output: seen.append(output))
    for batch in BATCHES:
        logits(model, batch)
    handle.remove()
    x = torch.cat([v[b["attention_mask"].bool()] for v, b in zip(seen, BATCHES, strict=True)]).double()
    weights = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
    magnitude = sum(relative_magnitude(w, GROUP) for w in weights) / 2
    kinds = [False, True] if duo_scaling == "both" else [duo_scaling]
    steps = 6 // len(kinds)
    candidates = [torch.ones(64)]
    for duo in kinds:
        for step in range(steps):
            activation = x.square().mean(0).sqrt().float()
            candidates.append(awq_scales(activation, magnitude if duo else None, step / steps))
    errors = [sum(_rounding_error(w, s, x) for w in weights) for s in candidates]

    awq = AWQModifier(mappings=MLP, duo_scaling=duo_scaling, n_grid=6)
    scaled, _ = apply(model, awq, Unrounded(scheme="W4A16", group_size=GROUP))
    found = layer.post_attention_layernorm.weight / scaled.model.layers[0].post_attention_layernorm.weight
    chosen = [i for i, candidate in enumerate(candidates) if torch.allclose(found, candidate, rtol=1e-4)]
    assert len(chosen) == 1
    # the largest weight of each group lies half-way between two codes: float32 may take the other one
    assert errors[chosen[0]] < 1.03 * min(errors)
    assert errors[chosen[0]] < 0.95 * errors[0]


def _rounding_error(weight: Tensor, scale: Tensor, x: Tensor) -> float:
    table = (weight * scale).reshape(-1, GROUP)
    grid = Grid("int", 4)
    qparams = minmax_qparams(table, grid, ScaleFormat())
    quantized = quantize_(table.clone(), qparams.scale[:, None], None, grid).reshape(weight.shape) / scale
    return float(((quantized - weight).double() @ x.T).square().sum())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_it_is_better_than_rounding_and_clipping_helps(scheme: str) -> None:
    model = one_layer()
    options = {"scheme": scheme, "group_size": GROUP}
    rounded, plain, clipped = (
        error_of(apply(model, modifier)[0], model)
        for modifier in (
            QuantizationModifier(**options, weight_observer="minmax"),
            AWQModifier(**options, weight_observer="minmax"),
            AWQModifier(**options),
        )
    )
    assert plain < 0.9 * rounded
    assert clipped < plain


def test_weights_lie_on_the_grid_and_results_say_what_was_done() -> None:
    model, outcome = apply(one_layer(), AWQModifier(scheme="W4A16", group_size=GROUP))
    results = {result.name: result for result in outcome.modules}
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        codes = module.weight.reshape(-1, GROUP) / module.weight_scale.reshape(-1, 1)
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.min() >= -8.01
        assert codes.max() <= 7.01
        assert results[name].measure == "output"
        assert 0 < results[name].error < 0.1
        assert results[name].scheme == "int4 group 32 symmetric"
    assert results["model.layers.0.input_layernorm"].scheme == "scaled for its readers"


def test_one_pass_for_scales_and_quantization() -> None:
    _, outcome = apply(one_layer(), AWQModifier(scheme="W4A16", group_size=GROUP))
    kinds = [
        step.kind for step in outcome.plans[0].steps if step.subgraph == 0 and step.kind in ("calibrate", "commit")
    ]
    assert kinds == ["calibrate", "commit"]


def test_gptq_after_it_solves_the_scaled_weights() -> None:
    model = one_layer()
    scheme = {"scheme": "W4A16", "group_size": GROUP}
    found, outcome = apply(model, AWQModifier(), GPTQModifier(**scheme))
    scaled, _ = apply(model, AWQModifier(), Unrounded(**scheme))
    expected, _ = apply(model, GPTQModifier(**scheme))
    assert torch.equal(found.model.layers[0].input_layernorm.weight, scaled.model.layers[0].input_layernorm.weight)
    assert not torch.equal(found.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)
    steps = [s.modifiers for s in outcome.plans[0].steps if s.subgraph == 0 and s.kind == "commit"]
    assert steps == [(0,), (1,)]


def test_rounding_after_it_knows_which_channels_count() -> None:
    model = one_layer()
    options = {"scheme": "W4A16", "group_size": GROUP}
    in_one, _ = apply(model, AWQModifier(**options, clip=False))
    in_two, _ = apply(model, AWQModifier(), QuantizationModifier(**options))
    for (name, expected), found in zip(in_one.named_parameters(), in_two.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not any(hasattr(module, IMPORTANCE) for module in in_two.modules())


def test_padding_and_masked_tokens_do_not_count() -> None:
    model = one_layer()
    options = {"scheme": "W4A16", "group_size": GROUP}
    padded = [token_batch(2, 20, seed=seed) for seed in range(2)]
    longer = []
    for batch in padded:
        extra = torch.full((2, 6), 7)
        zeros = torch.zeros(2, 6, dtype=torch.int64)
        longer.append(
            {
                "input_ids": torch.cat([batch["input_ids"], extra], 1),
                "attention_mask": torch.cat([batch["attention_mask"], zeros], 1),
            }
        )
    short, _ = apply(model, AWQModifier(**options), batches=padded)
    long, _ = apply(model, AWQModifier(**options), batches=longer)
    assert_same_norms(long, short)


def test_activations_may_be_told_by_another_module() -> None:
    model = one_layer()
    hooked = AWQMapping("re:.*post_attention_layernorm", ["re:.*gate_proj", "re:.*up_proj"], "up_proj")
    options = {"scheme": "W4A16", "group_size": GROUP}
    expected, _ = apply(model, AWQModifier(mappings=MLP, **options))
    found, _ = apply(model, AWQModifier(mappings=[hooked], **options))
    assert_same_norms(found, expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"duo_scaling": "all"}, "give True, False or 'both'"),
        ({"n_grid": 0}, "at least 1"),
        ({"ignore": ["lm_head"]}, "ignore without a scheme"),
        ({"group_size": 32}, "group_size without a scheme"),
        ({"scheme": "W4A17"}, "unknown scheme"),
        (
            {"scheme": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "dynamic": False}}},
            "cannot calibrate static activations",
        ),
    ],
)
def test_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        AWQModifier(**arguments)


def test_scales_alone_need_a_modifier_that_quantizes() -> None:
    with pytest.raises(OptionError, match="no other modifier is to quantize weights"):
        apply(one_layer(), AWQModifier())
