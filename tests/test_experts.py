"""Experts that stay as they are: a checkpoint says so in a way that readers by name and transformers understand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils import is_match
from tiny_llama import VOCABULARY, tiny_llama, tiny_mixture
from torch import nn
from transformers import AutoModelForCausalLM

from fxcalib import quantize
from fxcalib.experts import EXPERTS, GROUP, has_unquantized_experts


@pytest.mark.parametrize("architecture", ["Mixtral", "Olmoe", "Qwen3Moe", "DeepseekV3"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"])
def test_merged_experts_load_as_they_were(tmp_path: Path, architecture: str, scheme: str) -> None:
    model = tiny_mixture(architecture, dtype=torch.bfloat16)
    originals = {name: p.clone() for name, p in model.named_parameters() if ".experts." in name}
    group_size = 32 if scheme.startswith("W4") else None
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (2, 12))}]
    quantize(model, scheme=scheme, algorithm="rtn", group_size=group_size, output=tmp_path / "out", data=batches)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded(**batches[0]).logits, model(**batches[0]).logits, rtol=0, atol=1e-2)
    assert originals
    for name, original in originals.items():
        assert torch.equal(loaded.get_parameter(name), original), name

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert EXPERTS in config["ignore"]
    assert next(iter(config["config_groups"])) == GROUP


def test_the_pattern_is_of_routed_experts_only() -> None:
    linear = nn.Linear(1, 1)
    for name in ("model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts.3.w1"):
        assert is_match(name, linear, EXPERTS)
    for name in ("model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.experts_gate"):
        assert not is_match(name, linear, EXPERTS)


def test_other_models_need_no_such_group(tmp_path: Path) -> None:
    model = tiny_llama()
    assert not has_unquantized_experts(model)
    quantize(model, algorithm="rtn", group_size=32, output=tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]) == [
        "group_0"
    ]
