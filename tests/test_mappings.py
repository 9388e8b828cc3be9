"""Derived mappings: what they are, and that factors moved along them leave the model's outputs as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from batches import token_batch
from tiny_llama import VOCABULARY, tiny_llama, tiny_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fxcalib.errors import OptionError, TargetError
from fxcalib.mappings import AWQMapping, ChannelMapping, Derivation, derive, parse, resolve
from fxcalib.mappings.gains import gain_of
from fxcalib.math.smoothing import divide_gain_, factors_of_reader, keep, multiply_
from fxcalib.tracing import TraceError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "num_hidden_layers": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "GPTNeoX": {},
    "Phi": {},
    "Phi3": {"num_key_value_heads": 2},
    "Cohere": {"num_key_value_heads": 2},
    "Bloom": {},
}


def tiny(architecture: str, **options: Any) -> nn.Module:
    """One layer of width 64 with random biases and norms."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **ARCHITECTURES[architecture],
        **options,
    }
    config = getattr(transformers, f"{architecture}Config")(**settings)
    return disturbed(AutoModelForCausalLM.from_config(config))


def disturbed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def a_batch() -> dict[str, Any]:
    return token_batch(2, 11, seed=1, left=3, use_cache=False)


@cache
def derived(architecture: str) -> Derivation:
    """The mappings of the tiny model."""
    return derive(tiny(architecture), a_batch())


def fold(model: nn.Module, mapping: ChannelMapping, seed: int) -> None:
    """Move random factors from e^-1 to e along a mapping."""
    generator = torch.Generator().manual_seed(seed)
    scale_C = keep(torch.exp(torch.rand(mapping.channels, generator=generator) * 2 - 1), mapping.kept)
    source = model.get_submodule(mapping.source)
    for path, offset in mapping.offsets.items():
        divide_gain_(source.get_parameter(path), scale_C, offset)
    for reader in mapping.readers:
        weight = model.get_submodule(reader.module).get_parameter(reader.parameter)
        multiply_(weight, factors_of_reader(scale_C, reader.index(weight.device)), reader.axis)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def assert_unchanged_by_folding(model: nn.Module, mappings: tuple[ChannelMapping, ...]) -> None:
    before = logits(model, a_batch())
    for seed, mapping in enumerate(mappings):
        fold(model, mapping, seed)
    assert torch.allclose(logits(model, a_batch()), before, rtol=1e-4, atol=1e-4)


def pairs(mappings: tuple[ChannelMapping, ...], prefix: str) -> dict[str, list[str]]:
    """Source -> readers, of one layer and without its name."""
    return {
        m.source.removeprefix(prefix): [r.module.removeprefix(prefix) for r in m.readers]
        for m in mappings
        if m.source.startswith(prefix)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_changes_nothing(architecture: str) -> None:
    model = tiny(architecture)
    found = derived(architecture)
    norms = [m for m in found.mappings if not isinstance(model.get_submodule(m.source), nn.Linear)]
    assert len(norms) >= (1 if architecture in ("Phi", "Cohere") else 2)
    assert_unchanged_by_folding(model, found.mappings)


def test_llama() -> None:
    found = derived("Llama").mappings
    assert pairs(found, "model.layers.1.") == {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.v_proj": ["self_attn.o_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.up_proj": ["mlp.down_proj"],
    }
    grouped = next(m for m in found if m.source == "model.layers.0.self_attn.v_proj")
    heads = torch.arange(32).reshape(2, 16)
    assert torch.equal(
        grouped.readers[0].index(heads.device), heads.repeat_interleave(2, 0).flatten()
    )  # two query heads share one
    assert str(grouped) == "model.layers.0.self_attn.v_proj -> model.layers.0.self_attn.o_proj"


def test_one_norm_feeds_attention_and_mlp() -> None:
    found = pairs(derived("Phi").mappings, "model.layers.0.")
    assert found["input_layernorm"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]


def test_fused_projections_scale_in_part() -> None:
    found = {m.source: m for m in derived("Phi3").mappings}
    fused = found["model.layers.0.self_attn.qkv_proj"]
    assert fused.kept == tuple(range(96))  # queries and keys of 64 and 32 channels, then values
    gated = found["model.layers.0.mlp.gate_up_proj"]
    assert gated.kept == tuple(range(128))
    assert "(32 of 128 channels)" in str(fused)


def test_relu_passes_factors_and_gelu_does_not() -> None:
    relu = pairs(derived("OPT").mappings, "model.decoder.layers.0.")
    gelu = pairs(derive(tiny("OPT", activation_function="gelu"), a_batch()).mappings, "model.decoder.layers.0.")
    assert relu["fc1"] == ["fc2"]
    assert "fc1" not in gelu


def test_eager_attention_is_followed() -> None:
    model = tiny("Llama", num_hidden_layers=1, attn_implementation="eager")
    found = derive(model, a_batch())
    assert "model.layers.0.self_attn.v_proj" in {m.source for m in found.mappings}
    assert_unchanged_by_folding(model, found.mappings)


def test_offsets_of_norms() -> None:
    gemma = derived("Gemma").mappings
    llama = derived("Llama").mappings
    assert gemma[0].offsets == {"weight": 1.0}
    assert llama[0].offsets == {"weight": 0.0}
    assert derived("OPT").mappings[0].offsets == {"weight": 0.0, "bias": 0.0}
    assert gain_of(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert gain_of(nn.PReLU(8)) is None  # its parameter scales half of the values only


def test_models_on_the_meta_device_have_the_same_mappings() -> None:
    assert derive(tiny("Llama").to("meta"), a_batch()).mappings == derived("Llama").mappings


class Experts(nn.Module):
    """Three experts, a linear router, and one expert that is shared, as of transformers before version 5."""

    def __init__(self, hidden: int = 64, width: int = 64) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, 3, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(3))
        self.shared = Expert(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        result = self.shared(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if token.numel():
                result.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return result.reshape(hidden_states.shape)


class Expert(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
        return down


def test_experts_are_balanced_with_their_router() -> None:
    model = tiny("Llama", num_hidden_layers=1)
    for layer in model.model.layers:
        layer.mlp = Experts().requires_grad_(False)
    found = derive(model, a_batch())
    layer = pairs(found.mappings, "model.layers.0.")
    inner = [f"mlp.{e}.{w}" for e in ("shared", "experts.0", "experts.1", "experts.2") for w in ("w1", "w3")]
    assert sorted(layer["post_attention_layernorm"]) == sorted(["mlp.gate", *inner])
    assert layer["mlp.experts.2.w3"] == ["mlp.experts.2.w2"]
    assert_unchanged_by_folding(model, found.mappings)


@pytest.mark.parametrize("architecture", ["Mixtral", "DeepseekV3"])
def test_merged_experts_and_routers_that_are_no_linear_modules(architecture: str) -> None:
    model = disturbed(tiny_mixture(architecture))
    found = derive(model, a_batch())
    mixed = next(m for m in found.mappings if m.source == "model.layers.1.post_attention_layernorm")
    read = {f"{r.module}.{r.parameter}": r.axis for r in mixed.readers}
    assert read["model.layers.1.mlp.experts.gate_up_proj"] == 2
    assert read["model.layers.1.mlp.gate.weight"] == 1
    assert ("model.layers.1.mlp.shared_experts.up_proj.weight" in read) == (architecture == "DeepseekV3")
    assert_unchanged_by_folding(model, found.mappings)


class Glue(nn.Module):
    """Two linear modules and what lies between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, 12), nn.Linear(width, 4), between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.between(self.first(x)))
        return result


FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "heads": (lambda x: x.view(*x.shape[:2], 3, 4).transpose(1, 2).permute(0, 2, 1, 3).flatten(2), 12),
    "tokens": (lambda x: x.reshape(-1, 12)[None], 12),
    "heads repeated": (lambda x: x.unflatten(-1, (3, 4)).unsqueeze(3).expand(-1, -1, -1, 2, -1).flatten(2), 24),
    "heads interleaved": (lambda x: x.unflatten(-1, (3, 4)).repeat_interleave(2, -1).flatten(2), 24),
    "halves": (lambda x: torch.cat([x[..., 6:], -x[..., :6]], -1), 12),
    "gate": (lambda x: torch.tanh(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 6),
    "pieces": (lambda x: x.split([4, 8], -1)[1] / 3 + x.split([4, 8], -1)[1] * 2, 8),
    "beside zeros": (lambda x: torch.cat([torch.zeros_like(x[..., :2]), x], -1), 14),
    "unbound": (lambda x: x.unflatten(-1, (2, 6)).unbind(2)[1], 6),
    "rows": (lambda x: x[:, torch.arange(3)], 12),
    "average": (lambda x: torch.ones(x.shape[1], x.shape[1]).softmax(-1) @ x, 12),
    "relu": (lambda x: torch.relu(x).abs(), 12),
    "hidden": (lambda x: x.masked_fill(torch.ones(12, dtype=torch.bool), 0.0), 12),
    "hidden in place": (lambda x: x.masked_fill_(torch.arange(12) > 5, 0.0).mul_(2), 12),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "shifted": (lambda x: x + 1, 12),
    "squared": (lambda x: x * x, 12),
    "divisor": (lambda x: 1 / (3 + x), 12),
    "mixed": (lambda x: x + x.flip(-1), 12),
    "other channels": (lambda x: x[..., :6] + x[..., 6:], 6),
    "softmax": (lambda x: x.softmax(-1), 12),
    "product": (lambda x: x @ torch.ones(12, 12), 12),
    "filled with ones": (lambda x: x.masked_fill(torch.arange(12) > 5, 1.0), 12),
    "added in place": (lambda x: x.add_(1), 12),
    "normalized": (lambda x: nn.functional.layer_norm(x, (12,)), 12),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *REFUSED])
def test_operations_between_source_and_reader(name: str) -> None:
    between, width = {**FOLLOWED, **REFUSED}[name]
    torch.manual_seed(0)
    model = Glue(between, width)
    found = derive(model, {"x": torch.randn(2, 5, 8)}).mappings
    assert [(m.source, [r.module for r in m.readers]) for m in found] == [("first", ["second"])] * (name in FOLLOWED)
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        before = model(x)
        for mapping in found:
            fold(model, mapping, seed=0)
        assert torch.allclose(model(x), before, atol=1e-5)


class Residual(nn.Module):
    """A norm whose output is added to what a linear module makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.other = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        result: Tensor = self.other(torch.tanh(x + self.linear(x)))
        return result


def test_a_norm_with_another_reader_is_left_out() -> None:
    found = derive(Residual(), {"x": torch.randn(2, 5, 16)})
    assert found.mappings == ()
    assert found.left_out == {"norm": "its channels go through the operation add as well"}


class Tied(nn.Module):
    """A norm read by two linear modules that share one weight, and by one that has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.free = nn.LayerNorm(16), nn.LayerNorm(16)
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(self.free(torch.tanh(self.first(self.norm(x)) + self.second(x))))
        return result


def test_shared_weights_are_left_alone() -> None:
    assert pairs(derive(Tied(), {"x": torch.randn(2, 5, 16)}).mappings, "") == {"free": ["third"]}


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y * torch.from_numpy(y.detach().numpy())


def test_where_tracing_fails_mappings_are_asked_for() -> None:
    with pytest.raises(TraceError) as caught:
        derive(Untraceable(), {"x": torch.randn(2, 5, 8)})
    assert any("mappings=" in note for note in caught.value.__notes__)


LLAMA = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    {"smooth_layer": "re:.*post_attention_layernorm", "balance_layers": ["re:.*gate_proj", "re:.*up_proj"]},
    AWQMapping("re:.*up_proj", ["re:.*down_proj"], "down_proj"),
]


def test_given_mappings_pair_layers_by_closeness() -> None:
    model = tiny("Llama")
    given = parse(LLAMA)
    assert given is not None
    found = resolve(model, given)
    expected = {m.source: m for m in derived("Llama").mappings}
    assert len(found) == 6
    for mapping in found:
        assert mapping.readers == expected[mapping.source].readers
        assert mapping.offsets == expected[mapping.source].offsets
    assert found[-1].observed == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("mappings", "error", "match"),
    [
        ([], OptionError, "mappings is empty"),
        ("re:.*norm", OptionError, "give a list of mappings"),
        ([{"smooth": "a"}], OptionError, "did you mean 'smooth_layer'"),
        ([["q_proj"]], OptionError, "names no layers"),
        ([[["re:.*q_proj"], "re:.*nothing"]], TargetError, "smooth layer 're:.\\*nothing' matches no module"),
        ([[["re:.*q_pro("], "re:.*norm"]], TargetError, "no regular expression"),
        ([[["re:.*gate_proj"], "re:.*layernorm"]], OptionError, "is as close to the smooth layer"),
        ([[["re:.*q_proj"], "re:.*self_attn$"]], OptionError, "whose output channels no parameter scales"),
        ([[["re:.*act_fn"], "re:.*post_attention_layernorm"]], OptionError, "name linear modules"),
        ([[["re:.*down_proj"], "re:.*input_layernorm"]], OptionError, "has 64 output channels and"),
        ([AWQMapping("re:.*up_proj", ["re:.*down_proj"], "nowhere")], TargetError, "'nowhere' is no module of"),
    ],
)
def test_given_mappings_that_cannot_be_meant(mappings: Any, error: type[Exception], match: str) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=match):
        resolve(model, parse(mappings) or ())


def test_grouped_heads_in_given_mappings_are_warned_of() -> None:
    given = parse([[["re:.*o_proj"], "re:.*v_proj"]])
    with pytest.warns(UserWarning, match="leave mappings out, and the channels of grouped heads are found"):
        assert resolve(tiny_llama(), given or ()) == ()
