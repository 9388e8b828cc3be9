"""Schemes that no checkpoint format holds are refused by name; all others come back from theirs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from torch import nn

from fxcalib.checkpoint import compressed_state
from fxcalib.errors import OptionError
from fxcalib.modifiers import QuantizationModifier, Scope
from fxcalib.modifiers.formats import format_of

GRID = [
    *(
        {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
        for bits, symmetric, strategy in itertools.product(
            (2, 3, 4, 7, 8), (True, False),
            ({"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32},
             {"strategy": "tensor_group", "group_size": 16}, {"strategy": "block", "block_structure": [24, 64]},
             {"strategy": "attn_head"}, {"strategy": "group", "group_size": 32, "scale_dtype": "torch.float16"},
             {"strategy": "group", "group_size": 32, "zp_dtype": "torch.int32"}),
        )
    ),
    *(
        {"num_bits": bits, "type": "float", "symmetric": symmetric, "scale_dtype": scale, **strategy}
        for bits, symmetric, scale, strategy in itertools.product(
            (4, 6, 8), (True, False), (None, "torch.uint8", "torch.float8_e4m3fn"),
            ({"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "block", "block_structure": [24, 64]},
             *({"strategy": s, "group_size": size} for s in ("group", "tensor_group") for size in (16, 32, 64))),
        )
    ),
]  # fmt: skip


def accepted(weights: dict[str, Any], **fields: object) -> QuantizationModifier | None:
    """A modifier for such weights, or None where the scheme is refused, by name."""
    try:
        return QuantizationModifier(scheme={"weights": weights, **fields}, weight_observer="minmax")
    except OptionError as error:
        assert str(error).startswith(("scheme (", "scheme cannot be read: "))
        return None


def formats(weights: dict[str, Any]) -> Iterator[str | None]:
    """The usual format, and each that may be named."""
    yield None
    yield from (
        "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized",
        "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "marlin-24", "sparse-24-bitmask",
    )  # fmt: skip


def test_whatever_is_not_refused_is_held_by_its_format() -> None:
    """Weights are rounded, packed and unpacked, and are the same: no scheme is accepted and then stored wrongly."""
    torch.manual_seed(0)
    weight = torch.randn(32, 64, dtype=torch.bfloat16) * 0.05
    kept: set[tuple[str, int]] = set()
    for weights in GRID:
        for format_ in formats(weights):
            modifier = accepted(weights, format=format_)
            if modifier is None:
                continue
            module = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
            module.weight.copy_(weight)
            model = nn.Sequential(module)
            modifier.attach(model)
            modifier.commit(Scope(model, 0, {"0": module}))
            state = {key.removeprefix("0."): tensor for key, tensor in compressed_state(model).items()}
            scheme = module.quantization_scheme
            compressor = BaseCompressor.get_value_from_registry(format_of(nn.Linear, scheme).value)
            restored = compressor.decompress(state, scheme)["weight"]
            assert torch.equal(restored, module.weight), (weights, format_)
            kept.add((str(weights["type"]), int(weights["num_bits"])))
    assert kept >= {("int", bits) for bits in (2, 3, 4, 7, 8)} | {("float", 4), ("float", 8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheme": {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 64}}},
            r"scheme \(fp4 group 64\) fits no checkpoint format: 4-bit floats need strategy 'group' of 32 with "
            r"scale_dtype torch.uint8 \(MXFP4\), or strategy 'tensor_group' of 16",
        ),
        (
            {"config_groups": {"mlp": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "attn_head"}}}},
            r"config group 'mlp' \(int8 attn_head symmetric\) fits no .*: strategy 'attn_head' is one of activations",
        ),
        (
            {"scheme": {"weights": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}}},
            r"scheme \(int4 tensor_group 16 symmetric\) fits .*: only 4-bit floats have a global scale",
        ),
        (
            {"scheme": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": False}}},
            r"scheme \(fp8 channel\) fits no checkpoint format: floats have no zero point; set symmetric=True",
        ),
        (
            {"scheme": {"weights": {"num_bits": 8, "dynamic": True}}},
            r"scheme \(int8 tensor symmetric\) fits .*: weights have stored scales; set dynamic=False",
        ),
        (
            {"scheme": {"weights": {"num_bits": 4, "group_size": 32, "scale_dtype": "torch.float16"}}},
            r"scale_dtype torch.float16 is not kept; leave it out: scales have the dtype of the weight",
        ),
        (
            {"scheme": {"weights": {"num_bits": 4, "group_size": 32, "zp_dtype": "torch.int32", "symmetric": False}}},
            r"zp_dtype torch.int32 cannot be packed; leave it out",
        ),
        (
            {"scheme": {"weights": {"num_bits": 8, "type": "float", "group_size": -1}, "format": "pack-quantized"}},
            r"scheme \(fp8 channel\) cannot be stored as 'pack-quantized', only as 'int-quantized' or ",
        ),
        (
            {"scheme": {"weights": {"num_bits": 4, "group_size": 32}, "format": "marlin-24"}},
            r"cannot be stored as 'marlin-24', only as 'pack-quantized' or .*; leave `format` out",
        ),
        (
            {"scheme": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "strategy": "attn_head"}}},
            r"input_activations of a module have no heads; use strategy 'tensor' or 'token', or kv_cache_scheme",
        ),
        (
            {"scheme": {"weights": {"num_bits": 8}, "output_activations": {"num_bits": 8, "strategy": "channel"}}},
            r"output_activations cannot have strategy 'channel'; use 'tensor' or 'token'",
        ),
        (
            {"scheme": {"input_activations": {"num_bits": 8, "strategy": "tensor_group", "group_size": 16}}},
            r"input_activations have no static scales in groups; use dynamic='local' \(NVFP4\) or strategy 'tensor'",
        ),
    ],
)  # fmt: skip
def test_schemes_that_no_format_holds_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizationModifier(**arguments)
