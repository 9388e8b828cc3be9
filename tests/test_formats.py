"""Every scheme, from calibration over the checkpoint back to the same logits in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from modifiers.layerwise import calibrate
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fxcalib.checkpoint import save
from fxcalib.modifiers import GPTQModifier, QuantizationModifier

UP = "model.layers.0.mlp.up_proj"  # 256 x 128
BFLOAT16, FP8, INT32, INT8, FLOAT, UINT8 = (
    torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int8, torch.float32, torch.uint8,
)  # fmt: skip


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))


BATCHES = [ids(seed) for seed in range(3)]


def wide_llama(**options: object) -> LlamaForCausalLM:
    """Widths that groups and blocks of 128 divide."""
    settings = {"dtype": BFLOAT16, "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    return tiny_llama(**{**settings, **options})


class Case(NamedTuple):
    """Arguments of a modifier, and what is stored: the format and the tensors of `up_proj`."""

    arguments: dict[str, Any]
    format: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]


def packed(bits: int, groups: int, *, symmetric: bool = True) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    zero_points = {} if symmetric else {"weight_zero_point": (INT32, (256 * bits // 32, groups))}
    return {
        "weight_packed": (INT32, (256, 128 * bits // 32)),
        "weight_scale": (BFLOAT16, (256, groups)),
        "weight_shape": (torch.int64, (2,)),
        **zero_points,
    }


def unpacked(dtype: torch.dtype, *scale: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {"weight": (dtype, (256, 128)), "weight_scale": (BFLOAT16, scale)}


INPUT_SCALE = {"input_scale": (BFLOAT16, (1,))}
STATIC_INT8 = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
}
FP8_WEIGHTS = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
MX4 = {"weight_packed": (UINT8, (256, 64)), "weight_scale": (UINT8, (256, 4))}
MX6 = {"weight_packed": (UINT8, (256, 96)), "weight_scale": (UINT8, (256, 4))}
MX8 = {"weight": (FP8, (256, 128)), "weight_scale": (UINT8, (256, 4))}
NVFP4 = {
    "weight_packed": (UINT8, (256, 64)),
    "weight_scale": (FP8, (256, 8)),
    "weight_global_scale": (FLOAT, (1,)),
}

CASES = {
    **{
        f"W4A16{'' if symmetric else '_ASYM'} g{size}": Case(
            {"scheme": f"W4A16{'' if symmetric else '_ASYM'}", "group_size": size},
            "pack-quantized",
            packed(4, 1 if size == -1 else 128 // size, symmetric=symmetric),
        )
        for symmetric in (True, False)
        for size in (32, 64, 128, -1)
    },
    "W2A16": Case({"scheme": "W2A16"}, "pack-quantized", packed(2, 1)),
    "W3A16": Case({"scheme": "W3A16", "group_size": 64}, "pack-quantized", packed(3, 2)),
    "W8A16": Case({"scheme": "W8A16"}, "pack-quantized", packed(8, 1)),
    "W8A16 channel": Case({"scheme": "W8A16", "group_size": -1}, "pack-quantized", packed(8, 1)),
    "W8A8": Case({"scheme": "W8A8"}, "int-quantized", unpacked(INT8, 256, 1)),
    "W8A8 static": Case(
        {"scheme": STATIC_INT8}, "int-quantized",
        {**unpacked(INT8, 256, 1), **INPUT_SCALE, "input_zero_point": (INT8, (1,))},
    ),
    "W4A8": Case({"scheme": "W4A8", "group_size": 32}, "int-quantized", unpacked(INT8, 256, 4)),
    "W4AFP8": Case({"scheme": "W4AFP8"}, "int-quantized", unpacked(INT8, 256, 1)),
    "FP8": Case({"scheme": "FP8"}, "float-quantized", {**unpacked(FP8, 1), **INPUT_SCALE}),
    "FP8_DYNAMIC": Case({"scheme": "FP8_DYNAMIC"}, "float-quantized", unpacked(FP8, 256, 1)),
    "FP8_BLOCK": Case({"scheme": "FP8_BLOCK"}, "float-quantized", unpacked(FP8, 2, 1)),
    "FP8 weights": Case({"scheme": FP8_WEIGHTS}, "naive-quantized", unpacked(FP8, 256, 1)),
    "MXFP4": Case({"scheme": "MXFP4"}, "mxfp4-pack-quantized", MX4),
    "MXFP4A16": Case({"scheme": "MXFP4A16"}, "mxfp4-pack-quantized", MX4),
    "MXFP6A16": Case({"scheme": "MXFP6A16"}, "mxfp6-pack-quantized", MX6),
    "MXFP8": Case({"scheme": "MXFP8"}, "mxfp8-quantized", MX8),
    "MXFP8A16": Case({"scheme": "MXFP8A16"}, "mxfp8-quantized", MX8),
    "NVFP4": Case({"scheme": "NVFP4"}, "nvfp4-pack-quantized", {**NVFP4, "input_global_scale": (FLOAT, (1,))}),
    "NVFP4A16": Case({"scheme": "NVFP4A16"}, "nvfp4-pack-quantized", NVFP4),
}  # fmt: skip


@pytest.mark.parametrize("kind", [QuantizationModifier, GPTQModifier])
@pytest.mark.parametrize("name", CASES)
def test_logits_come_back_bit_by_bit(kind: type[QuantizationModifier], name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if isinstance(case.arguments["scheme"], str) and case.arguments["scheme"] not in PRESET_SCHEMES:
        pytest.skip("not in this compressed-tensors")
    model = wide_llama(num_hidden_layers=1)
    original = model(BATCHES[0]).logits
    calibrate(model, kind(**case.arguments), BATCHES)
    compressed = model(BATCHES[0]).logits
    save(model, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == case.format
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(UP)}
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in own.items()} == case.tensors

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(BATCHES[0]).logits, compressed)
    assert not torch.equal(compressed, original)


MIXED = {
    "regexes": {
        "config_groups": {
            "attention": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "group_size": 64}},
            "mlp": {
                "targets": [r"re:.*\.(gate|up)_proj$"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            },
        }
    },
    "presets": {"scheme": {"W8A8": ["re:.*self_attn.*"], "W4A16": ["re:.*mlp.*"]}},
    "preset groups": {"config_groups": {"NVFP4": ["re:.*mlp.*"], "FP8": ["re:.*[qkv]_proj$"]}},
    "unquantized": {"scheme": {"W8A16": ["Linear"], "UNQUANTIZED": ["re:.*down_proj$"]}},
}


@pytest.mark.parametrize("name", MIXED)
def test_schemes_of_groups_come_back_on_their_modules(name: str, tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1)
    calibrate(model, QuantizationModifier(**MIXED[name]), BATCHES)
    save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(BATCHES[0]).logits, model(BATCHES[0]).logits)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scheme = getattr(module, "quantization_scheme", None)
            found = getattr(reloaded.get_submodule(path), "quantization_scheme", None)
            assert (scheme and scheme.weights) == (found and found.weights), path
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == ("pack-quantized" if name == "unquantized" else "mixed-precision")


def test_the_names_of_tensors_tell_their_format_in_a_mixed_checkpoint(tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1)
    calibrate(model, QuantizationModifier(**MIXED["presets"]), BATCHES)
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{UP}.weight_packed" in stored and f"{UP}.weight" not in stored
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == INT8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("targets", "scheme"),
    [
        ("lm_head", "W4A16"),
        ("lm_head", "FP8"),
        (["Linear", "lm_head"], "NVFP4"),
        ("Embedding", {"weights": {"num_bits": 8, "strategy": "channel"}, "format": "int-quantized"}),
        (["Embedding", "Linear"], {**FP8_WEIGHTS}),
    ],
    ids=["head W4A16", "head FP8", "all NVFP4", "embeddings", "all"],
)
def test_embeddings_and_head(targets: str | list[str], scheme: object, tied: bool, tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight.clone()
    head = model.lm_head.weight.clone()
    original = model(BATCHES[0]).logits
    calibrate(model, GPTQModifier(targets=targets, scheme=scheme, ignore=()), BATCHES)
    asked = [targets] if isinstance(targets, str) else targets
    assert torch.equal(model.get_input_embeddings().weight, embedding) == ("Embedding" not in asked)
    assert torch.equal(model.lm_head.weight, head) == (asked == ["Embedding"])
    assert model.config.tie_word_embeddings is False
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("lm_head.weight") for name in stored)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.tie_word_embeddings is False
    assert torch.equal(reloaded(BATCHES[0]).logits, model(BATCHES[0]).logits)
    assert not torch.equal(model(BATCHES[0]).logits, original)


def test_packed_embeddings_are_stored_and_what_does_not_load_them_is_named(tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1, tie_word_embeddings=True)
    calibrate(model, QuantizationModifier(targets=["Embedding", "Linear"], scheme="W4A16", ignore=()), [])
    with pytest.warns(UserWarning, match=r"'model.embed_tokens' is stored packed, which transformers before 5.24 does"):
        save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert stored[f"{name}.weight_packed"].shape == (VOCABULARY, 16)
        assert f"{name}.weight" not in stored


def test_ties_that_are_not_committed_are_tied_again() -> None:
    model = wide_llama(tie_word_embeddings=True)
    modifier = QuantizationModifier(targets=["Linear", "Embedding"], scheme="W8A16", ignore=())
    modifier.attach(model)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    modifier.detach(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize(
    "arguments",
    [
        {"scheme": {"W4A16_ASYM": ["re:.*mlp.*"], "W8A8": ["re:.*self_attn.*"]}},
        {"scheme": "W4A16_ASYM", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {
            "scheme": {
                "weights": {"num_bits": 4, "symmetric": False, "group_size": 64},
                "output_activations": {"num_bits": 8, "strategy": "tensor"},
            }
        },
    ],
    ids=["mixed", "cache", "outputs"],
)
def test_packed_zero_points_are_never_dequantized_where_that_would_lose_the_rest(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = wide_llama(num_hidden_layers=1)
    calibrate(model, QuantizationModifier(**arguments), BATCHES)
    with pytest.warns(
        UserWarning, match=r"_proj' is stored packed, which transformers 5.24 loads only where one scheme"
    ):
        save(model, tmp_path / "out")
    assert "dequantize" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_the_format_that_the_warning_names_loads_everywhere(tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1)
    groups = {
        "mlp": {
            "targets": ["re:.*mlp.*"],
            "weights": {"num_bits": 4, "symmetric": False, "group_size": 64},
            "format": "int-quantized",
        },
        "W8A8": ["re:.*self_attn.*"],
    }
    calibrate(model, QuantizationModifier(config_groups=groups), BATCHES)
    save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(BATCHES[0]).logits, model(BATCHES[0]).logits)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "MXFP4A16", "NVFP4A16"])
def test_pruned_weights_stay_pruned(scheme: str, tmp_path: Path) -> None:
    """2:4 sparsity and quantization: zero is on every grid, also where the zero point moves."""
    model = wide_llama(num_hidden_layers=1)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    pruned = {}
    for name, module in linears.items():
        runs = module.weight.abs().unflatten(1, (-1, 4))
        smallest = runs.argsort(-1)[..., :2]
        pruned[name] = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, smallest, True).flatten(1)
        module.weight[pruned[name]] = 0
    calibrate(model, QuantizationModifier(scheme=scheme), BATCHES)
    logits = model(BATCHES[0]).logits
    save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(BATCHES[0]).logits, logits)
    for name in linears:
        assert not reloaded.get_submodule(name).weight[pruned[name]].any(), name


def test_the_config_names_the_observers_that_were_used(tmp_path: Path) -> None:
    model = wide_llama(num_hidden_layers=1)
    calibrate(model, QuantizationModifier(scheme="FP8"), BATCHES)
    save(model, tmp_path / "out")
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert QuantizationArgs(**group["weights"]).observer == "memoryless_mse"
    assert QuantizationArgs(**group["input_activations"]).observer == "static_minmax"
