"""Config and tensors of a checkpoint are those that llm-compressor writes for the same recipe, where it is installed.

Values are not compared: the scales are searched here and taken from the extremes there.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from modifiers.layerwise import calibrate
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, save_tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fxcalib.checkpoint import save
from fxcalib.modifiers import GPTQModifier, QuantizationModifier

oneshot = pytest.importorskip("llmcompressor").oneshot
peer = pytest.importorskip("llmcompressor.modifiers.quantization")

pytestmark = pytest.mark.filterwarnings("ignore")

ROLES = ("weights", "input_activations", "output_activations")
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def linear(**fields: object) -> dict[str, Any]:
    """Arguments that give all Linear modules one scheme."""
    return {"config_groups": {"group_0": {"targets": ["Linear"], **fields}}}


CASES: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in (
        "W4A16", "W4A16_ASYM", "W3A16", "W8A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4",
        "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4", "NVFP4A16",
    )},
    **{f"W4A16 {size}": linear(weights={"num_bits": 4, "strategy": "group", "group_size": size}) for size in (32, 64)},
    "W4A16 channel": linear(weights={"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "W8A8 static": linear(
        weights={"num_bits": 8, "strategy": "channel"},
        input_activations={"num_bits": 8, "strategy": "tensor", "symmetric": False},
    ),
    "outputs": linear(
        weights={"num_bits": 8, "strategy": "channel"}, output_activations={"num_bits": 8, "strategy": "tensor"}
    ),
    "FP8 weights": linear(weights={"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 static channel": linear(
        weights={"num_bits": 8, "type": "float", "strategy": "channel"},
        input_activations={"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "cache FP8": {"kv_cache_scheme": FP8_CACHE},
    "cache INT8": {"kv_cache_scheme": {**FP8_CACHE, "type": "int"}},
    "cache heads": {"scheme": "FP8", "kv_cache_scheme": {**FP8_CACHE, "strategy": "attn_head"}},
    "cache dynamic": {"scheme": "W4A16", "kv_cache_scheme": {**FP8_CACHE, "strategy": "token", "dynamic": True}},
    "cache and W8A8": {"scheme": "W8A8", "kv_cache_scheme": FP8_CACHE},
    "head": {"scheme": "W4A16", "ignore": []},
    "regexes": {
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "group_size": 64}},
            "group_1": {
                "targets": [r"re:.*\.(gate|up)_proj$"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            },
        }
    },
    "presets": {"scheme": {"W8A8": ["re:.*self_attn.*"], "W4A16": ["re:.*mlp.*"]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    options = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": False}
    save_tiny_llama(folder, dtype=torch.bfloat16, **options)
    return folder


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (1, 16), generator=generator) for _ in range(3)]


def written_by_peer(source: Path, folder: Path, modifier: object) -> None:
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(source)
    rows = [batch[0].tolist() for batch in batches()]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model, dataset=data, recipe=[modifier], num_calibration_samples=len(rows), max_seq_length=16,
        tokenizer=tiny_tokenizer(), log_dir=None,
    )  # fmt: skip
    model.save_pretrained(folder, save_compressed=True)


def written_here(source: Path, folder: Path, modifier: QuantizationModifier) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).requires_grad_(False)
    calibrate(model, modifier, batches())
    save(model, folder)


def config_of(folder: Path) -> dict[str, Any]:
    """The whole quantization config but for the observers, which differ, and the order of what is ignored."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    roles = [group[role] for group in config["config_groups"].values() for role in ROLES]
    for args in (*roles, config["kv_cache_scheme"]):
        if args is not None:
            args.pop("observer", None)
    config["ignore"].sort()
    return config


def tensors_of(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    stored = load_file(folder / "model.safetensors")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}


@pytest.mark.parametrize("name", CASES)
def test_config_and_tensors_are_the_peers(name: str, source: Path, tmp_path: Path) -> None:
    arguments = {"ignore": ["lm_head"], **CASES[name]}
    written_by_peer(source, tmp_path / "peer", peer.QuantizationModifier(**deepcopy(arguments)))
    written_here(source, tmp_path / "here", QuantizationModifier(**deepcopy(arguments)))
    expected, found = config_of(tmp_path / "peer"), config_of(tmp_path / "here")
    # the one field that the peer does not write; without it transformers 5.24 cannot load packed zero points
    assert found.pop("dequantize", False) == (name in ("W4A16_ASYM", "W4A16 channel"))
    assert found == expected
    assert tensors_of(tmp_path / "here") == tensors_of(tmp_path / "peer")


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_so_are_those_of_gptq(scheme: str, source: Path, tmp_path: Path) -> None:
    written_by_peer(source, tmp_path / "peer", peer.GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    written_here(source, tmp_path / "here", GPTQModifier(scheme=scheme))
    assert config_of(tmp_path / "here") == config_of(tmp_path / "peer")
    assert tensors_of(tmp_path / "here") == tensors_of(tmp_path / "peer")


def test_global_scales_are_the_peers_up_to_the_dtype_it_computes_in(source: Path, tmp_path: Path) -> None:
    written_by_peer(source, tmp_path / "peer", peer.QuantizationModifier(scheme="NVFP4", ignore=["lm_head"]))
    written_here(source, tmp_path / "here", QuantizationModifier(scheme="NVFP4"))
    expected, found = (load_file(tmp_path / each / "model.safetensors") for each in ("peer", "here"))
    for name in (name for name in expected if name.endswith("weight_global_scale")):
        torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=0.0)


def test_cache_scales_are_the_peers(source: Path, tmp_path: Path) -> None:
    written_by_peer(
        source, tmp_path / "peer", peer.QuantizationModifier(kv_cache_scheme={**FP8_CACHE, "observer": "static_minmax"})
    )
    written_here(
        source, tmp_path / "here", QuantizationModifier(kv_cache_scheme={**FP8_CACHE, "observer": "static_minmax"})
    )
    expected, found = (load_file(tmp_path / each / "model.safetensors") for each in ("peer", "here"))
    names = [name for name in expected if name.endswith(("k_scale", "v_scale"))]
    assert len(names) == 2
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=0.0)
