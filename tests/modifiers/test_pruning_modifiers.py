from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise import calibrate as calibrate_layerwise
from layerwise import scope_of, tiny_llama, token_batches
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fxcalib import calibrate
from fxcalib.checkpoint import save
from fxcalib.errors import NonFiniteActivationError, OptionError, TargetError
from fxcalib.math.hessian import Hessian
from fxcalib.math.pruning import Pattern, layer_sparsities, outlier_ratio
from fxcalib.modifiers import (
    GPTQModifier,
    MagnitudePruningModifier,
    Modifier,
    ModuleResult,
    QuantizationModifier,
    Scope,
    SparseGPTModifier,
    WandaModifier,
)
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.sparsity_modifier import SparsityModifier
from fxcalib.report import Report

BATCHES = token_batches(8)
TWO_FOUR = Pattern(2, 4)


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": each} for each in BATCHES[:count]]


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def part_of_zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())


def outputs(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(each).logits for each in BATCHES])


def run(model: nn.Module, modifiers: Modifier | Sequence[Modifier], **options: Any) -> Report:
    return calibrate(model, batches(), modifiers, device="cpu", **{"pipeline": "layer_sequential", **options})


@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier, MagnitudePruningModifier])
def test_patterns_are_met_and_reported(kind: type[SparsityModifier]) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    head = model.lm_head.weight.clone()
    report = run(model, kind(mask_structure="2:4"))
    assert all(TWO_FOUR.fits(module.weight) for module in projections(model).values())
    assert torch.equal(model.lm_head.weight, head)
    assert {m.name for m in report.modules} == set(projections(model))
    assert {m.scheme for m in report.modules} == {"2:4 sparse"}
    measure = {SparseGPTModifier: "output", WandaModifier: "output (diagonal)", MagnitudePruningModifier: "weight"}
    assert {m.measure for m in report.modules} == {measure[kind]}
    assert all(m.error is not None and 0 < m.error < 0.6 and m.notes == () for m in report.modules)


def test_unstructured_sparsity_is_that_of_blocks_rows_or_the_weight() -> None:
    found = {}
    for kind in (SparseGPTModifier, WandaModifier, MagnitudePruningModifier):
        model = tiny_llama()
        options = {"block_size": 16} if kind is SparseGPTModifier else {}
        report = run(model, kind(sparsity=0.25, **options))
        assert {m.scheme for m in report.modules} == {"25% sparse"}
        found[kind] = projections(model)["model.layers.0.mlp.gate_proj"].weight == 0
    for mask in found.values():
        assert int(mask.sum()) == mask.numel() // 4
    assert {int(n) for n in found[WandaModifier].sum(1)} == {16}
    assert {int(n) for n in found[SparseGPTModifier].reshape(128, 4, 16).sum((0, 2))} == {512}
    assert len({int(n) for n in found[MagnitudePruningModifier].sum(1)}) > 1


def test_sparsegpt_is_nearer_to_the_model_than_the_others() -> None:
    errors = []
    wanted = outputs(tiny_llama())
    for kind in (SparseGPTModifier, WandaModifier, MagnitudePruningModifier):
        model = tiny_llama()
        run(model, kind(mask_structure="2:4"))
        errors.append(float((outputs(model) - wanted).square().mean()))
    assert errors[0] < 0.8 * min(errors[1:])


@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier])
def test_reported_errors_are_those_of_outputs(kind: type[SparsityModifier]) -> None:
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False)
    original = layer.weight.clone()
    rows = torch.linalg.qr(torch.randn(500, 64)).Q * torch.linspace(
        0.1, 2, 64
    )  # uncorrelated, as Wanda takes them to be
    model = nn.Sequential(layer)
    modifier = kind(mask_structure="2:4")
    modifier.attach(model)
    scope = Scope(model, 0, {"0": layer})
    with modifier.observe(scope):
        model(rows)
    (result,) = modifier.commit(scope)
    wanted = rows @ original.T
    error = ((rows @ layer.weight.T - wanted).square().sum() / wanted.square().sum()).item()
    assert result.error == pytest.approx(error, rel=1e-3)


def test_modules_that_share_inputs_share_statistics() -> None:
    model = tiny_llama()
    modifier = WandaModifier(sparsity=0.5)
    modifier.attach(model)
    scope = scope_of(model, "model.layers.0")
    with modifier.observe(scope):
        for number, batch in enumerate(BATCHES):
            scope.batch.index = number
            model(batch)
    found: dict[str, InputStatistics] = dict(modifier._inputs)
    layer = "model.layers.0."
    assert len(found) == 7 and len({id(each) for each in found.values()}) == 4
    assert found[layer + "self_attn.q_proj"] is found[layer + "self_attn.v_proj"]
    assert all(each.hessian is None for each in found.values())


def test_padding_is_left_out_of_the_norms() -> None:
    layer = nn.Linear(8, 16, bias=False).requires_grad_(False)
    model = nn.Sequential(layer)
    modifier = WandaModifier(sparsity=0.5)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": layer})
    inputs = torch.randn(2, 5, 8)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    inputs[1, 2:] = float("nan")
    scope.batch.token_mask = real
    with modifier.observe(scope):
        model(inputs)
    squares = modifier._inputs["0"].squares
    assert squares is not None
    assert torch.allclose(squares.sum_I, inputs[real].square().sum(0), rtol=1e-5)


@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier])
def test_inputs_that_are_not_finite_are_refused(kind: type[SparsityModifier]) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    modifier = kind(sparsity=0.5)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": model[0]})
    with pytest.raises(NonFiniteActivationError, match="input of module '0' holds NaN"), modifier.observe(scope):
        model(torch.full((2, 32), float("nan")))


@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier])
def test_modules_that_no_batch_reaches_are_pruned_by_magnitude(kind: type[SparsityModifier]) -> None:
    model = nn.ModuleDict({"used": nn.Linear(32, 32), "expert": nn.Linear(32, 32)}).requires_grad_(False)
    expected = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    expected[0].weight.copy_(model["expert"].weight)
    run(expected, MagnitudePruningModifier(sparsity=0.5))
    modifier = kind(sparsity=0.5)
    modifier.attach(model)
    scope = Scope(model, 0, dict(model.named_children()))
    with modifier.observe(scope):
        model["used"](torch.randn(100, 32))
    used, expert = modifier.commit(scope)
    assert used.notes == ()
    assert (expert.measure, expert.notes) == ("weight", ("pruned by magnitude: no calibration batch reached it",))
    assert torch.equal(model["expert"].weight, expected[0].weight)


def test_inputs_that_are_all_zero_are_noted() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    modifier = SparseGPTModifier(mask_structure="2:4")
    modifier.attach(model)
    scope = Scope(model, 0, {"0": model[0]})
    with modifier.observe(scope):
        model(torch.zeros(10, 32))
    (result,) = modifier.commit(scope)
    assert result.notes == ("pruned by magnitude: the Hessian is zero: every input of the calibration data was",)
    assert TWO_FOUR.fits(model[0].weight)


def test_targets_may_be_modules_that_contain_linear_ones() -> None:
    model = tiny_llama()
    run(model, WandaModifier(sparsity=0.5, targets="LlamaMLP", ignore=["re:.*layers.1.*", "re:.*down_proj"]))
    pruned = {name for name, module in projections(model).items() if part_of_zeros(module.weight) > 0.4}
    assert pruned == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}


PIPELINES = [
    {"pipeline": "sequential"},
    {"pipeline": "sequential", "propagate_error": False},
    {"pipeline": "sequential", "targets": "Linear"},
    {"pipeline": "layer_sequential"},
    {"pipeline": "layer_sequential", "suspended": True},
    {"pipeline": "independent"},
    {"pipeline": None},
]


@pytest.mark.parametrize("options", PIPELINES, ids=str)
def test_all_pipelines(options: dict[str, Any]) -> None:
    model = tiny_llama()
    report = run(model, SparseGPTModifier(sparsity=0.5, sparsity_profile="owl"), **options)
    zeros = torch.cat([module.weight.flatten() for module in projections(model).values()])
    assert part_of_zeros(zeros) == pytest.approx(0.5, abs=0.005)
    assert not any(module.notes for module in report.modules)


@pytest.mark.filterwarnings("ignore:the basic pipeline calibrates every layer")
def test_the_basic_pipeline_calibrates_on_the_original_model() -> None:
    weights = []
    for options in ({"pipeline": "basic"}, {"pipeline": "sequential", "propagate_error": False}):
        model = tiny_llama()
        run(model, WandaModifier(sparsity=0.5, sparsity_profile="owl"), **options)
        weights.append([module.weight for module in projections(model).values()])
    assert all(map(torch.equal, *weights))


def test_magnitude_needs_no_data() -> None:
    model = tiny_llama()
    report = calibrate(model, None, MagnitudePruningModifier(init_sparsity=0.1, final_sparsity=0.5), pipeline=None)
    assert report.pipeline == "datafree" and report.passes == 0
    assert {part_of_zeros(module.weight) for module in projections(model).values()} == {0.5}


def owl_reference(model: LlamaForCausalLM, multiple: float) -> tuple[float, ...]:
    """Sparsities of the decoder layers from all inputs of the original model, kept whole."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in projections(model)}
    for name, module in projections(model).items():
        module.register_forward_pre_hook(
            lambda m, args, name=name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    outputs(model)
    ratios, sizes = [], []
    for number in range(len(model.model.layers)):
        own = {n: m for n, m in projections(model).items() if n.startswith(f"model.layers.{number}.")}
        scores = [m.weight.double().abs() * torch.cat(inputs[n]).double().norm(dim=0) for n, m in own.items()]
        ratios.append(float(outlier_ratio(scores, multiple)))
        sizes.append(sum(score.numel() for score in scores))
    return layer_sparsities(ratios, sizes, 0.6, 0.1)


@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier])
def test_owl_prunes_layers_with_outliers_less(kind: type[SparsityModifier]) -> None:
    def spoiled() -> LlamaForCausalLM:
        model = tiny_llama()
        for module in model.model.layers[1].modules():
            if isinstance(module, nn.Linear):
                module.weight[:, ::16] *= 10
        return model

    expected = owl_reference(spoiled(), 5)
    assert expected[0] == pytest.approx(0.7) and expected[1] == pytest.approx(0.5)
    model = spoiled()
    owl = kind(sparsity=0.6, sparsity_profile="owl", owl_m=5, owl_lmbda=0.1, **_small_blocks(kind))
    report = run(model, owl)
    assert len(report.modules) == 14
    for name, module in projections(model).items():
        assert part_of_zeros(module.weight) == pytest.approx(expected["layers.1" in name], abs=0.01)


def _small_blocks(kind: type[SparsityModifier]) -> dict[str, int]:
    return {"block_size": 32} if kind is SparseGPTModifier else {}


def test_owl_without_its_look_at_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match="sparsity_profile 'owl' needs a look at the whole original model"):
        calibrate_layerwise(tiny_llama(), WandaModifier(sparsity=0.5, sparsity_profile="owl"), BATCHES)


QUANTIZERS = [
    GPTQModifier(scheme="W4A16", group_size=32),
    GPTQModifier(scheme="W4A16_ASYM", group_size=32, actorder=None),
    GPTQModifier(scheme="W4A16", group_size=32, asymmetric=True, sequential_targets="LlamaDecoderLayer"),
    GPTQModifier(scheme="W8A8"),
    GPTQModifier(scheme="FP8"),
    QuantizationModifier(scheme="W4A16_ASYM", group_size=32),
    QuantizationModifier(scheme="FP8_DYNAMIC"),
]


@pytest.mark.parametrize(
    ("quantizer", "pipeline"),
    [
        *((each, "layer_sequential") for each in QUANTIZERS),
        (QUANTIZERS[0], "sequential"),
        (QUANTIZERS[1], "independent"),
    ],
    ids=lambda m: m if isinstance(m, str) else f"{type(m).__name__}-{m.arguments['scheme']}",
)
def test_sparse_then_quantized(quantizer: Modifier, pipeline: str, tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    report = run(model, [SparseGPTModifier(mask_structure="2:4"), quantizer], pipeline=pipeline)
    assert all(TWO_FOUR.fits(module.weight) for module in projections(model).values())
    schemes = {m.scheme for m in report.modules}
    assert len(schemes) == 2 and "2:4 sparse" in schemes
    save(model, tmp_path / "out", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.allclose(outputs(loaded), outputs(model), atol=2e-2)
    assert all(TWO_FOUR.fits(module.weight) for module in projections(loaded).values())


def test_gptq_makes_up_for_errors_without_touching_zeros() -> None:
    model = tiny_llama()
    gptq = GPTQModifier(scheme="W4A16", group_size=32)
    report = run(model, [SparseGPTModifier(sparsity=0.2), gptq])
    quantized = [m for m in report.modules if m.scheme.startswith("int4")]
    assert {m.notes for m in quantized} == {("pruned weights stay zero",)}
    assert all(part_of_zeros(module.weight) >= 0.199 for module in projections(model).values())
    rounded = tiny_llama()
    run(rounded, [SparseGPTModifier(sparsity=0.2), QuantizationModifier(scheme="W4A16", group_size=32)])
    wanted = outputs(tiny_llama())
    errors = [float((outputs(each) - wanted).square().mean()) for each in (model, rounded)]
    assert errors[0] < errors[1]


def test_zeros_of_a_sparse_checkpoint_are_kept_by_quantization(tmp_path: Path) -> None:
    model = tiny_llama()
    run(model, MagnitudePruningModifier(mask_structure="2:4"))
    save(model, tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    run(loaded, GPTQModifier(scheme="W4A16", group_size=32))
    assert all(TWO_FOUR.fits(module.weight) for module in projections(loaded).values())
    dense = tiny_llama()
    report = run(dense, GPTQModifier(scheme="W4A16", group_size=32))
    assert not any(m.notes for m in report.modules)


def test_sparse_checkpoints_are_plain_ones(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    report = run(model, SparseGPTModifier(mask_structure="2:4"))
    save(model, tmp_path / "out", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert getattr(loaded.config, "quantization_config", None) is None
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_mask_is_preserved_where_asked() -> None:
    def pruned() -> LlamaForCausalLM:
        model = tiny_llama()
        run(model, MagnitudePruningModifier(mask_structure="4:8"))
        return model

    model = pruned()
    zeros = {name: module.weight == 0 for name, module in projections(model).items()}
    run(model, SparseGPTModifier(sparsity=0.6, preserve_sparsity_mask=True, block_size=32))
    for name, module in projections(model).items():
        assert bool((module.weight == 0)[zeros[name]].all())
        assert part_of_zeros(module.weight) == pytest.approx(0.6, abs=0.01)
    with pytest.raises(OptionError, match=r"'model.layers.0.self_attn.q_proj' is pruned by another modifier already"):
        run(pruned(), SparseGPTModifier(sparsity=0.6))


def test_a_failed_run_leaves_no_mark() -> None:
    model = tiny_llama()
    before = {name: dict(module.__dict__) for name, module in projections(model).items()}
    with pytest.raises(TargetError):
        run(model, [WandaModifier(sparsity=0.5), GPTQModifier(scheme="W4A16", group_size=32, targets="nowhere")])
    assert {name: module.__dict__.keys() for name, module in projections(model).items()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


def test_the_same_data_gives_the_same_bits() -> None:
    weights = []
    for _ in range(2):
        model = tiny_llama()
        calibrate_layerwise(model, SparseGPTModifier(sparsity=0.5), BATCHES)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_hessians_are_collected_for_sparsegpt_alone() -> None:
    inputs = torch.randn(4, 8)
    makes = [kind(sparsity=0.5).makes_statistics for kind in (SparseGPTModifier, WandaModifier)]
    made = [make(inputs) for make in makes if make is not None]
    assert isinstance(made[0].hessian, Hessian) and made[0].squares is None
    assert made[1].hessian is None and made[1].squares is not None
    assert MagnitudePruningModifier(sparsity=0.5).makes_statistics is None


def test_results_are_in_the_order_of_the_model() -> None:
    model = tiny_llama()
    results: list[ModuleResult] = calibrate_layerwise(model, SparseGPTModifier(mask_structure="2:4"), BATCHES)
    assert [result.name for result in results] == list(projections(model))
