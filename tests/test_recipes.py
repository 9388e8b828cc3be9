"""Recipes: what is read from the format of llm-compressor, what is written to it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import token_batch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny_llama import tiny_llama, tiny_tokenizer
from torch import nn

import fxcalib.modifiers
from fxcalib import GPTQModifier, Modifier, QuantizationModifier, calibrate, quantize
from fxcalib.algorithms import ALGORITHMS, PRUNERS, Choice
from fxcalib.errors import OptionError, RecipeError
from fxcalib.modifiers import AWQModifier, ModuleResult, Needs, Scope, SmoothQuantModifier, SparseGPTModifier
from fxcalib.recipes import Recipe, dump_recipe, load_recipe, settings_of
from fxcalib.recipes.registry import modifier_classes

BATCHES = [token_batch(2, 16, seed=i, left=i % 3) for i in range(3)]

STAGES = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 8e-1
      mappings: [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]
    GPTQModifier:
      ignore: [lm_head]
      dampening_frac: 0.02
      actorder: null
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, strategy: group, group_size: 32, symmetric: true}
          input_activations: null
"""


def described(modifiers: Sequence[Modifier]) -> list[tuple[str, dict[str, Any]]]:
    model = tiny_llama()
    return [(type(modifier).__name__, settings_of(modifier, model)) for modifier in modifiers]


def test_stages_groups_and_config_groups() -> None:
    recipe = load_recipe(STAGES)
    assert isinstance(recipe, Recipe)
    smooth, gptq = recipe
    assert isinstance(smooth, SmoothQuantModifier)
    assert smooth.arguments["smoothing_strength"] == 0.8
    assert isinstance(gptq, GPTQModifier)
    assert dict(gptq.arguments) == {
        "ignore": ["lm_head"],
        "dampening_frac": 0.02,
        "actorder": None,
        "config_groups": gptq.arguments["config_groups"],
    }
    (scheme,) = gptq.schemes
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.actorder) == (4, 32, None)


def test_a_file_its_text_a_dict_json_and_lists_say_the_same(tmp_path: Path) -> None:
    arguments = {"scheme": "W8A8", "targets": "Linear", "ignore": ["lm_head"]}
    content = {"test_stage": {"quant_modifiers": {"QuantizationModifier": arguments}}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    (tmp_path / "recipe.yaml").write_text(
        "quant_modifiers:\n- QuantizationModifier:\n    scheme: W8A8\n    targets: Linear\n    ignore: [lm_head]\n"
    )
    flat = "- QuantizationModifier: &all {scheme: W8A8, targets: Linear, ignore: [lm_head]}\n"
    forms: list[Any] = [
        content,
        json.dumps(content),
        str(tmp_path / "recipe.json"),
        tmp_path / "recipe.yaml",
        flat,
        [{"QuantizationModifier": arguments}],
        "quant_stage: {modifiers: {QuantizationModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head]}}}",
    ]
    expected = described([QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"])])
    assert all(described(load_recipe(form)) == expected for form in forms)


def test_all_stages_make_one_run_in_order() -> None:
    text = (
        "sparsity_stage:\n  pruning_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4'}\n"
        "quant_stage:\n  quant_modifiers:\n    GPTQModifier: {scheme: W4A16, targets: Linear, ignore: [lm_head]}\n"
    )
    assert [type(modifier) for modifier in load_recipe(text)] == [SparseGPTModifier, GPTQModifier]


def test_where_ignore_is_left_out_nothing_is_ignored_as_in_llm_compressor() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    (modifier,) = load_recipe("quant_stage: {quant_modifiers: {QuantizationModifier: {scheme: W8A8}}}")
    assert isinstance(modifier, QuantizationModifier)
    assert "lm_head" in modifier.resolve(model)
    assert "lm_head" not in QuantizationModifier(scheme="W8A8").resolve(model)


def test_what_says_when_and_where_llm_compressor_computes_is_read_over() -> None:
    text = (
        "default_stage:\n  default_modifiers:\n    GPTQModifier:\n      scheme: W8A8\n      ignore: [lm_head]\n"
        "      requires_calibration_data: true\n      batched_quantization: auto\n"
        "      bypass_divisibility_checks: false\n      start: 0.0\n"
    )
    (modifier,) = load_recipe(text)
    assert set(modifier.arguments) == {"scheme", "ignore"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: a recipe is a mapping of stages, and this is empty; write the modifiers as quant_stage: "),
        ("a: [", "recipe:2: this is no YAML: "),
        ("quant_stage:\n  quant_modifiers: {}\n", "recipe:1: there is no modifier in it; write the modifiers as"),
        ("quant_stag:\n  a: 1\n", "recipe:1: quant_stag: there is no key of a recipe of this name: stages end in "),
        ("quant_stage:\n  quant_modifier:\n    a: 1\n", "recipe:2: quant_stage.quant_modifier: there is no group in a"),
        ("quant_stage: 3\n", "recipe:1: quant_stage: a stage is a mapping of groups, and this is a int"),
        (
            "a_stage:\n  b_modifiers:\n    GTPQModifier: {}\n",
            "recipe:3: a_stage.b_modifiers.GTPQModifier: there is no modifier 'GTPQModifier': "
            "did you mean 'GPTQModifier'",
        ),
        (
            "a_stage:\n  b_modifiers:\n    GPTQModifier:\n      scheme: W4A16\n      dampning_frac: 0.1\n",
            "recipe:5: a_stage.b_modifiers.GPTQModifier.dampning_frac: GPTQModifier has no argument 'dampning_frac': "
            "did you mean 'dampening_frac'?",
        ),
        (
            "a_stage:\n  b_modifiers:\n    GPTQModifier:\n      scheme: W4A16\n      dampening_frac: 7\n",
            "recipe:5: a_stage.b_modifiers.GPTQModifier.dampening_frac: dampening_frac 7 must be between 0 and 1",
        ),
        (
            "a_stage:\n  b_modifiers:\n    GPTQModifier:\n      scheme: W4A61\n",
            "recipe:4: a_stage.b_modifiers.GPTQModifier.scheme: unknown scheme 'W4A61'",
        ),
        (
            "a_stage:\n  b_modifiers:\n    GPTQModifier:\n      config_groups:\n        g:\n          targets: [A]\n"
            "          weigths: {num_bits: 4}\n",
            "recipe:7: a_stage.b_modifiers.GPTQModifier.config_groups.g.weigths: config group 'g' has no field",
        ),
        (
            "a_stage:\n  b_modifiers:\n    GPTQModifier: {scheme: W8A8}\n    GPTQModifier: {scheme: FP8}\n",
            "recipe:4: a_stage.b_modifiers.GPTQModifier: this key is in line 3 already, and only one of them would",
        ),
        ("- !GPTQModifier\n  scheme: W4A16\n", "recipe:1: the tag !GPTQModifier has no meaning; write GPTQModifier:"),
        (
            "a_modifiers:\n  GPTQModifier:\n    scheme: W8A8\n    block_size: eval(size)\n",
            "recipe:4: a_modifiers.GPTQModifier.block_size: 'eval(size)' is not evaluated",
        ),
        (
            "a_modifiers:\n  GPTQModifier:\n    scheme: W8A8\n    bypass_divisibility_checks: true\n",
            "recipe:4: a_modifiers.GPTQModifier.bypass_divisibility_checks: bypass_divisibility_checks is True, and",
        ),
        ("a_modifiers:\n  GPTQModifier: 3\n", "recipe:2: a_modifiers.GPTQModifier: its arguments are a int"),
        (
            "a_modifiers:\n  GPTQModifier: {scheme: W8A8}\n  QuantizationModifier: {scheme: FP8}\n",
            "recipe:3: a_modifiers.QuantizationModifier: target 'Linear' is quantized by a_modifiers.GPTQModifier "
            "(line 2) already; give each its own targets",
        ),
    ],
)
def test_what_cannot_be_read_names_line_and_key(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text if "\n" in text else text + "\n")
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, OptionError)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe 'none\.yaml' cannot be read: No such file"):
        load_recipe("none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="recipe is 3, a int; give a file, its text or a dict"):
        load_recipe(3)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"^recipe: a_stage\.b_modifiers\.GPTQModifier\.x: GPTQModifier has no"):
        load_recipe({"a_stage": {"b_modifiers": {"GPTQModifier": {"x": 1}}}})


def test_two_modifiers_of_one_module_are_refused_with_both_places() -> None:
    text = (
        "first_stage:\n  first_modifiers:\n    GPTQModifier:\n      config_groups:\n        a: {targets: [Linear], "
        "weights: {num_bits: 8, strategy: channel}}\n      ignore: ['re:.*up_proj', lm_head]\n"
        "    QuantizationModifier:\n      config_groups:\n        b: {targets: ['re:.*mlp.*'], weights: {num_bits: 8, "
        "strategy: channel}}\n"
    )
    recipe = load_recipe(text)
    message = (
        r"recipe:7: first_stage\.first_modifiers\.QuantizationModifier: module 'model\.layers\.0\.mlp\.gate_proj' is "
        r"quantized by first_stage\.first_modifiers\.GPTQModifier \(line 3\) already"
    )
    with pytest.raises(RecipeError, match=message):
        calibrate(tiny_llama(), BATCHES, recipe)
    with pytest.raises(RecipeError, match=r"recipe:1: .*GPTQModifier.targets: target 'Linaer' matches no"):
        calibrate(
            tiny_llama(),
            BATCHES,
            load_recipe("a_modifiers: {GPTQModifier: {scheme: W8A8, targets: Linaer, ignore: [lm_head]}}"),
        )


def test_a_recipe_gives_what_its_modifiers_give() -> None:
    text = "a_modifiers:\n  GPTQModifier: {scheme: W8A8, ignore: [lm_head], block_size: 32}\n"
    by_recipe, by_hand = tiny_llama(), tiny_llama()
    report = calibrate(by_recipe, BATCHES, load_recipe(text))
    calibrate(by_hand, BATCHES, GPTQModifier(scheme="W8A8", block_size=32))
    assert report.algorithm == "GPTQModifier"
    for (name, one), other in zip(by_recipe.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other), name


def choices() -> list[Choice]:
    plain = [Choice(algorithm, None if algorithm in PRUNERS else "W8A8") for algorithm in ALGORITHMS]
    return [
        *plain,
        Choice(group_size=32),
        Choice("awq", "W4A16", group_size=32, ignore="re:.*mlp.*"),
        Choice("gptq", "W8A8", smoothquant=0.8, kv_cache_scheme="fp8"),
        Choice("wanda", mask_structure="2:4"),
        Choice("magnitude", sparsity=0.3),
        Choice("rtn", {"W8A8": ["re:.*mlp.*"]}),
    ]


MADE: list[Sequence[Modifier]] = [
    *(choice.modifiers() for choice in choices()),
    [GPTQModifier(scheme="FP8", actorder=None), SparseGPTModifier(sparsity=0.25, ignore=["re:.*mlp.*"])],
    [
        QuantizationModifier(
            config_groups={
                "a": QuantizationScheme(targets=["re:.*mlp.*"], weights=QuantizationArgs(num_bits=8, group_size=64)),
                "b": {"targets": ["re:.*attn.*"], "weights": {"num_bits": 4, "strategy": "channel"}},
            },
            weight_observer="minmax",
        )
    ],
    [
        GPTQModifier(scheme="W8A8", targets="re:.*mlp.*", ignore=[]),
        GPTQModifier(scheme="FP8", targets=["re:.*attn.*proj"], observer="minmax"),
    ],
]


@pytest.mark.parametrize("modifiers", MADE, ids=range(len(MADE)))
def test_what_is_written_reads_back_to_equal_modifiers_also_in_llm_compressor(modifiers: Sequence[Modifier]) -> None:
    text = dump_recipe(modifiers, tiny_llama())
    assert described(load_recipe(text)) == described(modifiers)
    try:
        from llmcompressor.recipe import Recipe as TheirRecipe
    except ImportError:
        return
    theirs = TheirRecipe.create_instance(text)
    assert len(theirs.modifiers) == len(modifiers)
    assert [type(m) for m in load_recipe(theirs.yaml())] == [type(m) for m in modifiers]


def test_a_checkpoint_holds_the_recipe_of_its_run(tmp_path: Path) -> None:
    modifiers = [GPTQModifier(scheme="W4A16", group_size=32)]
    made = described(modifiers)
    quantize(tiny_llama(), modifiers=modifiers, data=BATCHES, processor=tiny_tokenizer(), output=tmp_path / "out")
    assert described(load_recipe(tmp_path / "out" / "recipe.yaml")) == made
    quantize(tiny_llama(), recipe=tmp_path / "out" / "recipe.yaml", data=BATCHES, output=tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


class OwnModifier(Modifier):
    """Does nothing to a model, by a rule."""

    def __init__(self, *, rule: object = None) -> None:
        self.rule = rule

    needs_data = False
    needs = Needs()

    def attach(self, model: nn.Module) -> None: ...

    def observe(self, scope: Scope) -> Any: ...

    def commit(self, scope: Scope) -> list[ModuleResult]:
        return []

    def detach(self, model: nn.Module) -> None: ...


def test_modifiers_of_users_are_read_and_written(tmp_path: Path) -> None:
    text = dump_recipe([OwnModifier(rule={"a": (1, 2)})], tiny_llama())
    (own,) = load_recipe(text)
    assert isinstance(own, OwnModifier)
    assert own.rule == {"a": [1, 2]}
    report = quantize(tiny_llama(), modifiers=OwnModifier(rule=len), output=tmp_path / "out")
    assert report.notes[-1].startswith("no recipe is saved: rule of OwnModifier is <built-in function len>, a builtin")
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_every_exported_modifier_can_be_named() -> None:
    exported = {name for name in fxcalib.modifiers.__all__ if name.endswith("Modifier") and name != "Modifier"}
    assert exported <= modifier_classes().keys()
    assert "WandaPruningModifier" in modifier_classes()


def test_options_that_do_not_go_together() -> None:
    bad: list[tuple[Mapping[str, Any], str]] = [
        ({"algorithm": "wanda", "scheme": "W4A16"}, "scheme does not go with algorithm 'wanda', only with gptq"),
        ({"algorithm": "gptq", "mask_structure": "2:4"}, "mask_structure does not go with algorithm 'gptq', only"),
        ({"algorithm": "awq", "smoothquant": 0.5}, "smoothquant and awq scale the same channels"),
        ({"kv_cache_scheme": "int9"}, "unknown kv_cache_scheme 'int9': did you mean 'int8'"),
        ({"algorithm": "wandas"}, "unknown algorithm 'wandas': did you mean 'wanda'"),
    ]
    for options, message in bad:
        with pytest.raises(OptionError, match=message):
            Choice(**options).modifiers()
    with pytest.raises(OptionError, match="modifiers and a recipe are given"):
        quantize(tiny_llama(), modifiers=AWQModifier(), recipe={"a_modifiers": {"AWQModifier": {}}})
