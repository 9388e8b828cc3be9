import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from layerwise import scope_of, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from fxcalib.errors import AlreadyQuantizedError, NonFiniteWeightError, OptionError, TargetError
from fxcalib.modifiers import GPTQModifier, QuantizationModifier
from fxcalib.modifiers.qargs import describe
from fxcalib.modifiers.schemes import build_schemes, check_finite, resolve


def test_presets_go_to_all_linears_but_the_head() -> None:
    resolved = resolve(tiny_llama(), build_schemes("Linear", "fp8_dynamic", None))
    assert len(resolved) == 14
    assert "lm_head" not in resolved
    assert describe(resolved["model.layers.0.mlp.up_proj"]) == "fp8 channel, input fp8 token dynamic"


@pytest.mark.parametrize("name", [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"])
def test_every_preset_is_known(name: str) -> None:
    (scheme,) = build_schemes("Linear", name.lower(), None)
    assert describe(scheme)


def test_a_model_without_a_head_needs_no_ignore() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    resolved = resolve(model, build_schemes("Linear", "W4A16", None, group_size=32))
    assert list(resolved) == ["0", "2"]
    assert describe(resolved["0"]) == "int4 group 32 symmetric"


def test_group_size_minus_one_is_one_scale_per_channel() -> None:
    (scheme,) = build_schemes("Linear", "W4A16", None, group_size=-1)
    assert describe(scheme) == "int4 channel symmetric"


def test_the_most_specific_target_wins() -> None:
    groups = {
        "classes": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "patterns": {"targets": ["re:.*proj"], "weights": {"num_bits": 4}},
        "names": QuantizationScheme(
            targets=["model.layers.1.mlp.up_proj"], weights=QuantizationArgs(num_bits=3, symmetric=False)
        ),
    }
    resolved = resolve(tiny_llama(), build_schemes("Linear", None, groups), ignore=())
    assert describe(resolved["lm_head"]) == "int8 tensor symmetric"
    assert describe(resolved["model.layers.0.mlp.up_proj"]) == "int4 tensor symmetric"
    assert describe(resolved["model.layers.1.mlp.up_proj"]) == "int3 tensor asymmetric"


def test_presets_may_have_their_own_targets_and_unquantized_frees_some() -> None:
    schemes = build_schemes("Linear", {"W8A16": ["re:.*mlp.*"], "UNQUANTIZED": "re:.*down_proj"}, None, None)
    schemes[0].weights = QuantizationArgs(num_bits=8)
    resolved = resolve(tiny_llama(), schemes)
    assert {name.rpartition(".")[2] for name in resolved} == {"gate_proj", "up_proj"}


def test_observers_can_be_chosen() -> None:
    (scheme,) = build_schemes("Linear", "FP8", None, observers={"weights": "minmax", "input_activations": "mse"})
    assert scheme.weights is not None and scheme.weights.observer == "minmax"
    assert scheme.input_activations is not None and scheme.input_activations.observer == "mse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W4A61"}, r"unknown scheme 'W4A61': did you mean 'W4A16'"),
        ({"scheme": "W4A16", "config_groups": {}}, r"give either `scheme` .* or `config_groups`, not both"),
        ({}, r"not neither"),
        ({"scheme": {"wieghts": {}}}, r"scheme has no field 'wieghts': did you mean 'weights'\?"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "typ": "int"}}}}, r"config group 'g' cannot be read"),
        ({"config_groups": {"W4A16": ["Linear"], "W8A8": ["Linear"]}}, r"target 'Linear' is in two config groups"),
        ({"scheme": "W4A16", "weight_observer": "mze"}, r"unknown observer 'mze': did you mean 'mse'"),
        ({"scheme": "W4A16", "observer": {"wts": "mse"}}, r"observer of 'wts': choose from weights, input, output"),
        (
            {"scheme": "W8A8", "group_size": 64},
            r"group size 64 does not apply: the scheme quantizes weights per channel",
        ),
        ({"scheme": "NVFP4", "group_size": 64}, r"weights per tensor_group of 16, fixed by its format"),
        ({"scheme": "W4A16", "group_size": 0}, r"group size 0 must be at least 1"),
        ({"scheme": "W4A16", "group_size": 64.0}, r"group size 64.0 must be a whole number of columns"),
        ({"scheme": "W4A16", "kv_cache_scheme": "fp8"}, r"kv_cache_scheme is 'fp8'; give a dict such as"),
        ({"scheme": {"weights": {"num_bits": 0}}}, r"num_bits of weights is 0; int formats have 2, 3, .*, 8 bits"),
        ({"scheme": {"weights": {"num_bits": 1}}}, r"num_bits of weights is 1; int formats have 2, 3, .*, 8 bits"),
        ({"scheme": {"weights": {"num_bits": 17}}}, r"num_bits of weights is 17; int formats"),
        ({"scheme": {"weights": {"num_bits": 5, "type": "float"}}}, r"scheme cannot be read: Only num_bits in"),
        (
            {
                "scheme": {
                    "weights": {"num_bits": 8},
                    "input_activations": {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": False},
                }
            },
            r"input_activations in groups cannot have static scales: .*; use dynamic=True",
        ),
        ({"scheme": 4}, r"scheme is 4; give a preset's name, such as 'W4A16'"),
        ({"config_groups": {}}, r"config_groups is {}; give a dict of names to schemes, at least one"),
        ({"scheme": "W4A16", "observer": 3}, r"observer is 3; give a name, such as 'mse'"),
        ({"scheme": "W4A16", "weight_observer": 3}, r"observer of weights is 3; give a name"),
        ({"scheme": "W4A16", "targets": None}, r"target is None; give a name, a class name or an 're:' pattern"),
        ({"scheme": "W4A16", "targets": [1]}, r"target holds 1, a int; each must be a name"),
        ({"scheme": "W4A16", "targets": []}, r"targets is empty, so nothing would be quantized"),
        ({"scheme": "W4A16", "sequential_targets": 5}, r"sequential target is 5; give a name"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizationModifier(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, r"block_size 0 must be a whole number of columns"),
        ({"dampening_frac": -1}, r"dampening_frac -1 must be between 0 and 1"),
        ({"dampening_frac": "a"}, r"dampening_frac 'a' must be between 0 and 1"),
        ({"actorder": "group"}, r"actorder 'group' was removed"),
        ({"actorder": "statik"}, r"unknown actorder 'statik': did you mean 'static'"),
    ],
)
def test_gptq_arguments_that_cannot_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GPTQModifier(scheme="W4A16", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        ("Linaer", None, r"target 'Linaer' matches no module: did you mean 'Linear'"),
        ("model.layers.0.mlp.up_prj", None, r"did you mean 'model.layers.0.mlp.up_proj'"),
        ("re:.*upp_proj", None, r"target 're:.*upp_proj' matches no module: a pattern is matched from the start"),
        ("LlamaMLP", None, r"target 'LlamaMLP' matches only LlamaMLP; Linear and Embedding modules can be quantized"),
        ("Linear", ["lm_haed"], r"ignore pattern 'lm_haed' matches no module: did you mean 'lm_head'"),
        ("Linear", ["Linear"], r"nothing to quantize: every module that \['Linear'\] match is ignored by \['Linear'\]"),
    ],
)
def test_targets_that_match_nothing(targets: str, ignore: list[str] | None, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve(tiny_llama(), build_schemes(targets, "W4A16", None, group_size=32), ignore)


@pytest.mark.parametrize("arguments", [{"targets": "re:("}, {"ignore": ["re:["]}])
def test_patterns_that_are_no_regular_expression(arguments: dict[str, object]) -> None:
    with pytest.raises(TargetError, match=r"is no regular expression: .* at character 1 behind 're:'; write special"):
        QuantizationModifier(scheme="W4A16", **arguments)  # type: ignore[arg-type]


def test_where_nothing_is_left_to_quantize_the_message_says_where_weights_are() -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=16, vocab_size=32)
    with pytest.raises(TargetError, match=r"most weights are in Conv1D \(9\d%\), and only Linear and Embedding"):
        resolve(GPT2LMHeadModel(config), build_schemes("Linear", "W4A16", None))
    with pytest.raises(TargetError, match=r"name other targets, or ignore less than \['Linear'\]"):
        resolve(tiny_llama(), build_schemes("Linear", "W4A16", None), ["Linear"])


def test_group_sizes_that_do_not_divide_name_layers_and_sizes() -> None:
    with pytest.raises(OptionError) as caught:
        resolve(tiny_llama(), build_schemes("Linear", "W4A16", None))
    assert str(caught.value) == (
        "group size 128 of weights does not divide the input width of model.layers.0.self_attn.q_proj (64), "
        "model.layers.0.self_attn.k_proj (64), model.layers.0.self_attn.v_proj (64), "
        "model.layers.0.self_attn.o_proj (64) and 8 more; sizes that fit them: 64, 32, 16, 8; or ignore these modules"
    )


def test_tied_weights_are_refused_unless_they_are_input_and_output_embeddings() -> None:
    model = tiny_llama(tied=True)
    schemes = build_schemes("Linear", "W8A8", None)
    assert "lm_head" not in resolve(model, schemes)
    assert "lm_head" in resolve(model, schemes, ignore=())
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    message = r"the weight of 'model.layers.0.mlp.up_proj' is tied to 'model.layers.1.mlp.up_proj.weight': a checkpoint"
    with pytest.raises(OptionError, match=message):
        resolve(model, schemes)


def test_embeddings_that_more_than_the_head_shares_are_refused() -> None:
    """The config's word that they are tied means more in such models, so a checkpoint cannot take it back."""
    config = T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, d_kv=32, vocab_size=64)
    with pytest.raises(OptionError, match=r"the weight of 'lm_head' is tied to 'shared.weight'"):
        resolve(T5ForConditionalGeneration(config), build_schemes("lm_head", "W8A8", None), ignore=())


def test_quantized_models_are_refused() -> None:
    model = tiny_llama()
    modifier = QuantizationModifier(scheme="W8A16", group_size=32)
    modifier.attach(model)
    with pytest.raises(OptionError, match=r"'model.layers.0.self_attn.q_proj' is quantized by another modifier too"):
        resolve(model, build_schemes("Linear", "W8A8", None))
    modifier.commit(scope_of(model, ""))
    with pytest.raises(AlreadyQuantizedError, match="start from the original checkpoint"):
        resolve(model, build_schemes("Linear", "W8A8", None))
    fresh = tiny_llama()
    fresh.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(AlreadyQuantizedError, match=r"quantized already \(gptq\)"):
        resolve(fresh, build_schemes("Linear", "W8A8", None))


def test_embeddings_have_no_activations_to_quantize() -> None:
    with pytest.raises(OptionError, match=r"'model.embed_tokens' is an embedding"):
        resolve(tiny_llama(), build_schemes("Embedding", "W8A8", None))


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteWeightError, match=r"'model.layers.1.mlp.up_proj.weight' holds 1 NaN or infinite"):
        QuantizationModifier(scheme="W8A8").attach(model)
    huge = nn.Linear(64, 64, bias=False)
    huge.weight.data.fill_(3e38)
    check_finite("huge", huge)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16"])
def test_two_level_formats_hold_bfloat16_only(dtype: torch.dtype, scheme: str) -> None:
    with pytest.raises(OptionError, match=r"float.., but the format of its scheme holds bfloat16; load the model in"):
        resolve(tiny_llama(dtype=dtype), build_schemes("Linear", scheme, None))
