"""Scales of cached keys and values are those of what transformers' own cache holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, is_cached_attention_module
from layerwise import calibrate, scope_of, tiny_llama, token_batches
from safetensors.torch import load_file
from tiny_llama import tiny_mixture
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import fxcalib
from fxcalib.checkpoint import save
from fxcalib.errors import AlreadyQuantizedError, NonFiniteActivationError, OptionError, TargetError
from fxcalib.modifiers import GPTQModifier, QuantizationModifier

BATCHES = token_batches()
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor"}


def cached(model: PreTrainedModel, batches: list[torch.Tensor], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, S, D) that the model's own cache holds in a layer."""
    with torch.no_grad():
        outputs = [model(input_ids=batch, use_cache=True) for batch in batches]
    caches = [output["cache"] if "cache" in output else output["past_key_values"] for output in outputs]
    return tuple(torch.cat([getattr(c.layers[layer], part) for c in caches]) for part in ("keys", "values"))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def enable(model: nn.Module, quantized: bool) -> None:
    for module in model.modules():
        if hasattr(module, "k_scale"):
            module.quantization_enabled = quantized


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
@pytest.mark.parametrize(("args", "divisor"), [(FP8, 448.0), (INT8, 127.5)], ids=["fp8", "int8"])
def test_scales_cover_what_the_cache_holds(
    kind: type[QuantizationModifier], args: dict[str, object], divisor: float
) -> None:
    model = tiny_llama()
    expected = [float(states.abs().max()) / divisor for states in cached(model, BATCHES, 0)]
    results = calibrate(model, kind(kv_cache_scheme=args), BATCHES)
    attention = model.model.layers[0].self_attn
    assert [attention.k_scale.tolist(), attention.v_scale.tolist()] == [pytest.approx([e], rel=1e-6) for e in expected]
    assert [result.name for result in results] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    what = "fp8 tensor static" if args is FP8 else "int8 tensor symmetric static"
    assert results[0].scheme == f"key-value cache {what}" and results[0].error is None and results[0].notes == ()


def test_each_head_may_have_its_scale() -> None:
    model = tiny_llama()
    model.config.num_key_value_heads = 2
    model = type(model)(model.config).eval().requires_grad_(False)
    keys, values = cached(model, BATCHES, 0)
    calibrate(model, QuantizationModifier(kv_cache_scheme={**FP8, "strategy": "attn_head"}), BATCHES)
    attention = model.model.layers[0].self_attn
    for scale, states_BHSD in ((attention.k_scale, keys), (attention.v_scale, values)):
        torch.testing.assert_close(scale, (states_BHSD.abs().amax((0, 2, 3)) / 448)[:, None, None])


def test_asymmetric_integers_get_a_zero_point() -> None:
    model = tiny_llama()
    keys, _ = cached(model, BATCHES, 1)
    modifier = QuantizationModifier(kv_cache_scheme={**INT8, "symmetric": False})
    modifier.attach(model)
    scope = scope_of(model, "")
    with modifier.observe(scope):
        for batch in BATCHES:
            model(batch)
    modifier.commit(scope)
    attention = model.model.layers[1].self_attn
    scale = float(keys.max() - keys.min()) / 255
    assert attention.k_scale.item() == pytest.approx(scale, rel=1e-6)
    assert attention.k_zero_point.item() == round(-128 - float(keys.min()) / scale)


def test_padding_is_left_out() -> None:
    model = tiny_llama()
    lengths = torch.tensor([3, 2])
    masks = [torch.arange(24)[None] < lengths[:, None] for _ in BATCHES]
    keys, _ = cached(model, BATCHES, 0)
    real = torch.cat(masks)[:, None, :, None]
    calibrate(model, QuantizationModifier(kv_cache_scheme=FP8), BATCHES, masks)
    expected = float((keys * real).abs().max()) / 448
    assert expected < float(keys.abs().max()) / 448
    assert model.model.layers[0].self_attn.k_scale.item() == pytest.approx(expected, rel=1e-6)


def test_the_cache_holds_quantized_keys_and_values_from_the_commit_on() -> None:
    model = tiny_llama()
    before = model(BATCHES[0]).logits
    hooks = hooks_of(model)
    modifier = QuantizationModifier(kv_cache_scheme=FP8)
    modifier.attach(model)
    assert modifier.needs.observed == modifier.needs.committed
    assert modifier.needs.committed == {f"model.layers.{layer}.self_attn.kv_cache" for layer in (0, 1)}
    attached = hooks_of(model)
    scope = scope_of(model, "")
    with modifier.observe(scope):
        assert torch.equal(model(BATCHES[0]).logits, before)
    assert hooks_of(model) == attached == hooks + 2
    modifier.commit(scope)
    modifier.detach(model)
    assert not torch.equal(model(BATCHES[0]).logits, before)
    keys, _ = cached(model, BATCHES[:1], 0)
    codes = keys / model.model.layers[0].self_attn.k_scale
    torch.testing.assert_close(codes.to(torch.float8_e4m3fn).float(), codes, rtol=1e-6, atol=1e-6)
    longer = model.generate(BATCHES[0], max_new_tokens=3, do_sample=False)
    assert longer.shape == (2, 27)


def test_detach_takes_away_what_was_never_committed() -> None:
    model = tiny_llama()
    before, names, hooks = model(BATCHES[0]).logits, list(model.state_dict()), hooks_of(model)
    modules = [name for name, _ in model.named_modules()]
    attributes = set(vars(model.model.layers[0].self_attn))
    modifier = QuantizationModifier(scheme="W8A8", kv_cache_scheme=FP8)
    modifier.attach(model)
    modifier.detach(model)
    assert torch.equal(model(BATCHES[0]).logits, before)
    assert list(model.state_dict()) == names and hooks_of(model) == hooks
    assert [name for name, _ in model.named_modules()] == modules
    assert set(vars(model.model.layers[0].self_attn)) == attributes


@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_dynamic_scales_need_no_data(strategy: str) -> None:
    modifier = QuantizationModifier(kv_cache_scheme={**FP8, "strategy": strategy, "dynamic": True})
    assert not modifier.needs_data
    model = tiny_llama()
    before = model(BATCHES[0]).logits
    report = fxcalib.calibrate(model, None, modifier, pipeline=None)
    assert report.pipeline == "datafree" and len(report.modules) == 2
    assert not torch.equal(model(BATCHES[0]).logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline": "basic"},
        {"pipeline": "layer_sequential"},
        {"pipeline": "layer_sequential", "suspended": True},
        {"targets": "LlamaAttention"},
        {"targets": "Linear"},
    ],
    ids=["basic", "layer_sequential", "suspended", "attention", "linear"],
)
@pytest.mark.filterwarnings("ignore:the basic pipeline calibrates every layer")
def test_every_pipeline_finds_the_same_scales(options: dict[str, object]) -> None:
    scales = []
    for each in ({"pipeline": "sequential"}, options):
        model = tiny_llama()
        modifier = QuantizationModifier(kv_cache_scheme=FP8)
        fxcalib.calibrate(model, [{"input_ids": batch} for batch in BATCHES], modifier, **each)  # type: ignore[arg-type]
        scales.append(
            [getattr(layer.self_attn, f"{part}_scale").item() for layer in model.model.layers for part in "kv"]
        )
    # the first layer's are equal; the second's is calibrated behind a quantized or an unquantized first one
    assert scales[0][:2] == scales[1][:2]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6 if options.get("pipeline") != "basic" else 0.05)


@pytest.mark.parametrize("architecture", ["Mixtral", "Olmoe", "Qwen3Moe", "DeepseekV3"])
def test_other_attention(architecture: str) -> None:
    model = tiny_mixture(architecture)
    keys, values = cached(model, BATCHES, 0)
    data = [{"input_ids": batch} for batch in BATCHES]
    fxcalib.calibrate(model, data, QuantizationModifier(kv_cache_scheme=FP8))
    attention = model.model.layers[0].self_attn
    found = [attention.k_scale.item(), attention.v_scale.item()]
    assert found == pytest.approx([float(states.abs().max()) / 448 for states in (keys, values)], rel=1e-5)


@pytest.mark.parametrize("args", [FP8, INT8, {**INT8, "symmetric": False}], ids=["fp8", "int8", "int8 asymmetric"])
@pytest.mark.parametrize("scheme", [None, "W4A16", "FP8"])
def test_saved_scales_come_back(tmp_path: Path, scheme: str | None, args: dict[str, object]) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    group_size = 32 if scheme == "W4A16" else None
    calibrate(model, QuantizationModifier(scheme=scheme, group_size=group_size, kv_cache_scheme=args), BATCHES)
    save(model, tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    parts = ("k_scale", "v_scale", *(() if args.get("symmetric", True) else ("k_zero_point", "v_zero_point")))
    own = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0].endswith("0.self_attn")}
    assert own.keys() == set(parts)
    assert all(own[part].dtype == (torch.bfloat16 if "scale" in part else torch.int8) for part in parts)
    assert all(tensor.shape == (1,) for tensor in own.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert QuantizationArgs(**config["kv_cache_scheme"]) == QuantizationArgs(**args)
    assert list(config["config_groups"]) == ([] if scheme is None else ["group_0"])
    assert config["ignore"] == ([] if scheme is None else ["lm_head"])

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if not is_cached_attention_module(model.model.layers[0].self_attn):
        # this transformers loads the weights, and compressed-tensors does not know its attention
        enable(model, False)
    assert torch.equal(reloaded(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_attention_that_no_batch_reaches_gets_a_note() -> None:
    model = tiny_llama()
    modifier = QuantizationModifier(kv_cache_scheme=FP8)
    modifier.attach(model)
    scope = scope_of(model, "model.layers.0")
    with modifier.observe(scope):
        pass
    (result,) = modifier.commit(scope)
    assert result.notes == ("no batch reached it: its scales cover the values from -1 to 1",)
    assert model.model.layers[0].self_attn.v_scale.tolist() == pytest.approx([1 / 448])


@pytest.mark.parametrize("part", ["k", "v"])
def test_values_that_are_not_finite_are_named(part: str) -> None:
    model = tiny_llama()
    modifier = QuantizationModifier(kv_cache_scheme=FP8)
    modifier.attach(model)
    model.model.layers[1].self_attn.get_submodule(f"{part}_proj").weight[0, 0] = float("inf")
    scope = scope_of(model, "")
    what = "keys" if part == "k" else "values"
    message = rf"the {what} of module 'model.layers.1.self_attn' hold NaN or infinity in batch 0; check"
    with pytest.raises(NonFiniteActivationError, match=message), modifier.observe(scope):
        for number, batch in enumerate(BATCHES):
            scope.batch.index = number
            model(batch)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (8, r"kv_cache_scheme is 8; give a dict such as"),
        ({"bits": 8}, r"kv_cache_scheme cannot be read: "),
        ({"num_bits": 12}, r"num_bits of kv_cache_scheme is 12; int formats have 2, 3, .* bits"),
        ({**FP8, "strategy": "channel"}, r"strategy 'channel' and dynamic=False; .* 'tensor' or 'attn_head'"),
        ({**FP8, "strategy": "attn_head", "observer": "mse"}, r"observer 'mse' has no scale for each head"),
        ({**FP8, "symmetric": False}, r"a cache of floats has 8 bits and symmetric=True; or use type 'int'"),
        ({**FP8, "num_bits": 4}, r"a cache of floats has 8 bits"),
        ({**FP8, "scale_dtype": "torch.float8_e4m3fn"}, r"scale_dtype torch.float8_e4m3fn is not kept; leave it out"),
        ({**FP8, "observer": "mean"}, r"unknown observer 'mean'"),
    ],
)
def test_arguments_that_no_cache_can_have(args: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizationModifier(scheme="W8A8", kv_cache_scheme=args)


def test_models_without_such_attention_are_refused() -> None:
    message = r"kv_cache_scheme finds no attention with a cache: .*; leave kv_cache_scheme out for this model"
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=16, vocab_size=32)
    with pytest.raises(TargetError, match=message):
        QuantizationModifier(kv_cache_scheme=FP8).attach(GPT2LMHeadModel(config))
    with pytest.raises(TargetError, match=message):
        QuantizationModifier(scheme="W8A8", kv_cache_scheme=FP8).attach(nn.Sequential(nn.Linear(8, 8)))


def test_a_cache_is_quantized_once() -> None:
    model = tiny_llama()
    first = QuantizationModifier(kv_cache_scheme=FP8)
    first.attach(model)
    with pytest.raises(OptionError, match=r"'model.layers.0.self_attn' are quantized by another modifier too"):
        QuantizationModifier(kv_cache_scheme=FP8).attach(model)
    first.commit(scope_of(model, ""))
    with pytest.raises(AlreadyQuantizedError, match=r"'model.layers.0.self_attn' is quantized already"):
        QuantizationModifier(kv_cache_scheme=FP8).attach(model)
