"""SmoothQuantModifier in the pipelines: scales by their definition, unchanged outputs, order of commits, arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from batches import token_batch
from tiny_llama import tiny_llama, tiny_mixture
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from fxcalib import GPTQModifier, QuantizationModifier, SmoothQuantModifier
from fxcalib.errors import NonFiniteActivationError, OptionError, TargetError
from fxcalib.modifiers import Modifier
from fxcalib.pipelines import CalibrationPipeline, Outcome

BATCHES = [token_batch(2, 16, seed=seed, left=3) for seed in range(3)]
LAYER = "model.layers.1"


def one_layer(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = tiny_llama(dtype=dtype, num_hidden_layers=1)
    spread(model)
    return model


def spread(model: nn.Module) -> None:
    """Norms of very different gains, so that activations have outlier channels."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data *= torch.exp(torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def apply(
    model: nn.Module, *modifiers: Modifier, pipeline: str = "sequential", batches: Any = None
) -> tuple[nn.Module, Outcome]:
    changed = copy.deepcopy(model)
    flow = CalibrationPipeline.from_modifiers(modifiers, pipeline)
    return changed, flow(changed, BATCHES if batches is None else batches)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def test_scales_are_those_of_the_paper_and_padding_does_not_count() -> None:
    model = one_layer()
    seen: list[Tensor] = []
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_hook(lambda m, args, output: seen.append(output))
    for batch in BATCHES:
        logits(model, batch)
    handle.remove()
    real = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, BATCHES, strict=True)]).double()
    mlp = model.model.layers[0].mlp
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).double()
    scale = real.abs().amax(0) ** 0.7 / weights.abs().amax(0) ** 0.3

    smoothed, outcome = apply(model, SmoothQuantModifier(smoothing_strength=0.7))
    after = smoothed.model.layers[0]
    assert torch.allclose(after.post_attention_layernorm.weight.double(), norm.weight.double() / scale, rtol=1e-4)
    assert torch.allclose(after.mlp.up_proj.weight.double(), mlp.up_proj.weight.double() * scale, rtol=1e-4)
    assert [result.name for result in outcome.modules] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    assert outcome.modules[0].scheme == "smoothed with strength 0.7"


@pytest.mark.parametrize("pipeline", ["sequential", "layer_sequential", "basic"])
@pytest.mark.filterwarnings("ignore:the basic pipeline")
def test_outputs_are_unchanged(pipeline: str) -> None:
    model = one_layer()
    smoothed, _ = apply(model, SmoothQuantModifier(smoothing_strength=0.8), pipeline=pipeline)
    assert not torch.equal(smoothed.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    for batch in BATCHES:
        assert torch.allclose(logits(smoothed, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_are_rounded_once() -> None:
    model = one_layer(torch.bfloat16)
    smoothed, _ = apply(model, SmoothQuantModifier(smoothing_strength=0.5))
    difference = (logits(smoothed, BATCHES[0]) - logits(model, BATCHES[0])).abs().max()
    assert difference < 0.05 * logits(model, BATCHES[0]).abs().max()
    assert smoothed.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_it_is_committed_before_the_next_modifier_calibrates_the_subgraph() -> None:
    _, outcome = apply(one_layer(), SmoothQuantModifier(), GPTQModifier(scheme="W8A8"))
    steps = [(step.kind, step.modifiers) for step in outcome.plans[0].steps if step.subgraph == 0]
    expected = [("calibrate", (0,)), ("commit", (0,)), ("calibrate", (1,)), ("commit", (1,))]
    assert [step for step in steps if step[0] in ("calibrate", "commit")] == expected


def test_static_scales_are_of_the_smoothed_activations() -> None:
    model = one_layer()
    static = {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
    }
    smoothed, _ = apply(model, SmoothQuantModifier(smoothing_strength=0.8))
    expected, _ = apply(smoothed, QuantizationModifier(scheme=static))
    found, _ = apply(model, SmoothQuantModifier(smoothing_strength=0.8), QuantizationModifier(scheme=static))
    for name, module in found.named_modules():
        if hasattr(module, "input_scale"):
            assert torch.allclose(module.input_scale, expected.get_submodule(name).input_scale)


def test_smoothing_lowers_the_error_of_quantized_activations() -> None:
    model = one_layer()
    wanted = logits(model, BATCHES[0])
    plain, _ = apply(model, QuantizationModifier(scheme="W8A8"))
    smoothed, _ = apply(model, SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(scheme="W8A8"))
    error, smaller = ((logits(m, BATCHES[0]) - wanted).square().mean() for m in (plain, smoothed))
    assert smaller < 0.8 * error


def test_only_what_is_quantized_is_smoothed() -> None:
    quantizer = QuantizationModifier(scheme="W8A8", ignore=["re:.*mlp.*", "lm_head"])
    _, outcome = apply(one_layer(), SmoothQuantModifier(), quantizer)
    smoothed = [result.name for result in outcome.modules if result.scheme.startswith("smoothed")]
    assert smoothed == ["model.layers.0.input_layernorm"]


def test_given_mappings_and_ignored_layers() -> None:
    model = one_layer()
    mappings = [
        [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
        [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
    ]
    derived, _ = apply(model, SmoothQuantModifier())
    given, _ = apply(model, SmoothQuantModifier(mappings=mappings))
    for (name, expected), found in zip(derived.named_parameters(), given.parameters(), strict=True):
        assert torch.equal(found, expected), name
    _, outcome = apply(model, SmoothQuantModifier(mappings=mappings, ignore="re:.*input_layernorm"))
    assert [result.name for result in outcome.modules] == ["model.layers.0.post_attention_layernorm"]


def test_merged_experts_are_scaled_with_the_modules_beside_them() -> None:
    model = tiny_mixture("DeepseekV3")
    spread(model)
    smoothed, outcome = apply(model, SmoothQuantModifier(smoothing_strength=0.6))
    assert "model.layers.1.post_attention_layernorm" in {result.name for result in outcome.modules}
    for batch in BATCHES:
        assert torch.allclose(logits(smoothed, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_mappings_that_subgraphs_cut_are_given_up_with_a_warning() -> None:
    model = one_layer()
    modifier = SmoothQuantModifier()
    modifier.sequential_targets = ["Linear"]
    with pytest.warns(UserWarning, match="and 1 more modules not smoothed: what reads"):
        smoothed, _ = apply(model, modifier)
    for (name, expected), found in zip(model.named_parameters(), smoothed.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_non_finite_activations_are_refused() -> None:
    model = one_layer()
    model.model.layers[0].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(NonFiniteActivationError, match=r"input of module .model\.layers\.0"):
        apply(model, SmoothQuantModifier())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"smoothing_strength": 1.5}, OptionError, "must be from 0 to 1"),
        ({"smoothing_strength": "high"}, OptionError, "give a number from 0 to 1"),
        ({"num_calibration_steps": 0}, OptionError, "num_calibration_steps is 0"),
        ({"calibration_function": print}, OptionError, "calibration_function"),
        ({"mappings": []}, OptionError, "mappings is empty"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SmoothQuantModifier(**arguments)


def test_ignored_layers_have_to_exist() -> None:
    with pytest.raises(TargetError, match="ignore pattern 'nothing' matches no module"):
        apply(one_layer(), SmoothQuantModifier(ignore="nothing"))
    with pytest.raises(TargetError, match="finds nothing to scale"):
        apply(one_layer(), SmoothQuantModifier(ignore="LlamaRMSNorm"))


def test_fewer_batches_may_be_observed() -> None:
    model = one_layer()
    first, _ = apply(model, SmoothQuantModifier(), batches=BATCHES[:1])
    limited, _ = apply(model, SmoothQuantModifier(num_calibration_steps=1))
    for (name, expected), found in zip(first.named_parameters(), limited.parameters(), strict=True):
        assert torch.equal(found, expected), name
