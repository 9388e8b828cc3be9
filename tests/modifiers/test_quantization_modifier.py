from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle import forward
from layerwise import calibrate, scope_of, tiny_llama, token_batches
from torch import nn
from transformers import AutoModelForCausalLM

from fxcalib.checkpoint import save
from fxcalib.errors import NonFiniteActivationError
from fxcalib.modifiers import GPTQModifier, QuantizationModifier, Scope
from fxcalib.modifiers.scheme_modifier import SchemeModifier

BATCHES = token_batches()
UP = "model.layers.0.mlp.up_proj"
STATIC_INT8 = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    "output_activations": {"num_bits": 8, "strategy": "tensor"},
}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"scheme": "W4A16", "group_size": 32}, torch.bfloat16),
        ({"scheme": "W4A16_ASYM", "group_size": 16}, torch.float16),
        ({"scheme": "W8A8"}, torch.float32),
        ({"scheme": "FP8"}, torch.float32),
        ({"scheme": "FP8_DYNAMIC"}, torch.bfloat16),
        ({"scheme": "NVFP4"}, torch.bfloat16),
        ({"scheme": "MXFP4"}, torch.bfloat16),
        ({"scheme": STATIC_INT8}, torch.float32),
    ],
    ids=["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4", "static"],
)
def test_a_saved_model_gives_the_same_logits(
    kind: type[SchemeModifier], arguments: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_llama(dtype=dtype)
    before = model(BATCHES[0]).logits
    results = calibrate(model, kind(**arguments), BATCHES)  # type: ignore[arg-type]
    assert len(results) == 14 and all(result.error is not None and 0 < result.error < 0.1 for result in results)
    in_memory = model(BATCHES[0]).logits
    assert 0 < (in_memory - before).abs().max() < 1
    save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(BATCHES[0]).logits, in_memory)


def test_nothing_changes_until_commit_and_hooks_live_in_observe_only() -> None:
    model = tiny_llama()
    before = model(BATCHES[0]).logits
    modifier = QuantizationModifier(scheme=STATIC_INT8)
    assert modifier.needs_data
    modifier.attach(model)
    assert len(modifier.needs.observed) == len(modifier.needs.committed) == 14
    assert torch.equal(model(BATCHES[0]).logits, before)
    scope = scope_of(model, "model.layers.0")
    with modifier.observe(scope):
        assert hooks_of(model) == 14
        assert torch.equal(model(BATCHES[0]).logits, before), "statistics are of unquantized computations"
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="from the body"), modifier.observe(scope):
        raise RuntimeError("from the body")
    assert hooks_of(model) == 0
    with modifier.observe(scope):
        model(BATCHES[0])
    modifier.commit(scope)
    assert not torch.equal(model(BATCHES[0]).logits, before)


def test_weights_are_on_the_grid_of_their_stored_scales() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    calibrate(model, QuantizationModifier(scheme="W4A16", group_size=32), [])
    module = model.get_submodule(UP)
    assert isinstance(module, nn.Linear)
    scale = module.weight_scale
    assert isinstance(scale, torch.Tensor) and scale.dtype == torch.bfloat16
    codes = module.weight.float().reshape(128, 2, 32) / scale.float()[:, :, None]
    assert (codes - codes.round()).abs().max() < 0.05
    again = (codes.round() * scale.float()[:, :, None]).to(torch.bfloat16)
    assert torch.equal(again.reshape(128, 64), module.weight)


def test_committed_weights_are_not_quantized_again_in_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    calibrate(model, QuantizationModifier(scheme="W8A8"), [])
    seen: list[str] = []

    real = forward.forward_quantize
    monkeypatch.setattr(
        forward,
        "forward_quantize",
        lambda module, value, role, args: (seen.append(role), real(module, value, role, args))[1],
    )
    model(BATCHES[0])
    assert set(seen) == {"input"}
    assert model.get_submodule(UP).quantization_status == QuantizationStatus.DECOMPRESSED


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "W4AFP8"])
def test_weights_and_dynamic_activations_need_no_data(scheme: str) -> None:
    modifier = QuantizationModifier(scheme=scheme, group_size=32 if scheme.startswith("W4") else None)
    assert not modifier.needs_data
    modifier.attach(tiny_llama())
    assert not modifier.needs.observed and len(modifier.needs.committed) == 14
    assert GPTQModifier(scheme=scheme).needs_data


def test_static_input_scales_cover_what_was_seen_without_padding() -> None:
    model = tiny_llama()
    lengths = torch.tensor([24, 10])
    masks = [torch.arange(24)[None] < lengths[:, None] for _ in BATCHES]
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    with torch.no_grad():
        for batch, mask in zip(BATCHES, masks, strict=True):
            model(input_ids=batch, attention_mask=mask.long())
    handle.remove()
    calibrate(model, QuantizationModifier(scheme="FP8"), BATCHES, masks)
    largest = max(float(values[mask].abs().max()) for values, mask in zip(inputs, masks, strict=True))
    for name in "qkv":
        scale = model.get_submodule(f"model.layers.0.self_attn.{name}_proj").input_scale
        assert isinstance(scale, torch.Tensor)
        assert scale.tolist() == pytest.approx([largest / 448], rel=1e-5)


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
def test_activations_that_are_not_finite_name_module_and_batch(kind: type[SchemeModifier]) -> None:
    model = tiny_llama()
    modifier = kind(scheme="FP8")
    modifier.attach(model)
    model.model.embed_tokens.weight[7] = float("nan")
    batches = [batch.masked_fill(batch == 7, 8) for batch in BATCHES]
    batches[2][1, 3] = 7
    scope = scope_of(model, "model.layers.0")
    message = r"the input of module 'model.layers.0.self_attn.k_proj' holds NaN or infinity in batch 2"
    with pytest.raises(NonFiniteActivationError, match=message), modifier.observe(scope):
        for number, batch in enumerate(batches):
            scope.batch.index = number
            model(batch)
    assert hooks_of(model) == 0


def test_modules_without_data_get_a_range_and_a_note() -> None:
    model = nn.ModuleDict({"used": nn.Linear(64, 64), "unused": nn.Linear(64, 64)}).requires_grad_(False)
    modifier = QuantizationModifier(scheme="FP8")
    modifier.attach(model)
    scope = Scope(model, 0, dict(model.named_children()))
    with modifier.observe(scope):
        model["used"](torch.full((3, 64), 56.0))
    used, unused = modifier.commit(scope)
    assert used.notes == ()
    assert unused.notes == ("no batch reached it: its input scale covers what the modules around it were given",)
    scale = model["unused"].input_scale
    assert isinstance(scale, torch.Tensor) and scale.tolist() == [56 / 448]


def test_detach_frees_what_was_never_committed() -> None:
    model = tiny_llama()
    before = model(BATCHES[0]).logits
    modifier = QuantizationModifier(scheme="W8A8")
    modifier.attach(model)
    modifier.detach(model)
    assert torch.equal(model(BATCHES[0]).logits, before)
    assert not any(hasattr(module, "quantization_scheme") for module in model.modules())
    assert not any("scale" in name for name, _ in model.named_parameters())


def test_parameters_are_made_where_the_weight_is() -> None:
    with torch.device("meta"):
        model = tiny_llama_on_meta()
    modifier = QuantizationModifier(scheme="W4A16_ASYM", group_size=32)
    modifier.attach(model)
    source = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(source.weight.data.clone(), requires_grad=False)
    modifier.commit(Scope(nn.Sequential(model), 0, {"": model}))
    for name in ("weight_scale", "weight_zero_point"):
        parameter = getattr(model, name)
        assert parameter.device.type == "cpu" and parameter.shape == (64, 2)


def tiny_llama_on_meta() -> nn.Linear:
    return nn.Linear(64, 64, bias=False)


def test_embeddings_are_quantized_when_asked() -> None:
    model = tiny_llama()
    (result,) = calibrate(model, QuantizationModifier(targets="Embedding", scheme="W8A16", group_size=32), [])
    assert result.name == "model.embed_tokens" and result.error is not None and result.error < 1e-3
