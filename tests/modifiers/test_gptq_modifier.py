import pytest
import torch
from layerwise import calibrate, scope_of, tiny_llama, token_batches
from torch import nn

from fxcalib.modifiers import GPTQModifier, QuantizationModifier, Scope
from fxcalib.modifiers.scheme_modifier import SchemeModifier

BATCHES = token_batches(8)


def output_error(modifier: SchemeModifier) -> float:
    """Mean relative squared error of the decoder layers' linear outputs on the calibration data."""
    model, original = tiny_llama(), tiny_llama()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        original.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0])
        )
    for batch in BATCHES:
        original(batch)
    calibrate(model, modifier, BATCHES)
    errors = []
    for name in names:
        rows = torch.cat([values.reshape(-1, values.shape[-1]) for values in inputs[name]])
        wanted = rows @ original.get_submodule(name).weight.T
        errors.append(
            ((rows @ model.get_submodule(name).weight.T - wanted).square().sum() / wanted.square().sum()).item()
        )
    return sum(errors) / len(errors)


@pytest.mark.parametrize("actorder", ["static", "weight", None])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_outputs_are_closer_than_by_rounding(actorder: str | None, scheme: str) -> None:
    gptq = output_error(GPTQModifier(scheme=scheme, group_size=32, actorder=actorder))
    rounding = output_error(QuantizationModifier(scheme=scheme, group_size=32))
    assert gptq < 0.9 * rounding


def test_modules_that_share_inputs_share_a_hessian() -> None:
    model = tiny_llama()
    modifier = GPTQModifier(scheme="W4A16", group_size=32)
    modifier.attach(model)
    scope = scope_of(model, "model.layers.0")
    with modifier.observe(scope):
        for number, batch in enumerate(BATCHES):
            scope.batch.index = number
            model(batch)
    found = {name: modifier.statistics_of(name) for name in scope.modules if name.endswith("proj")}
    distinct = {id(statistics) for statistics in found.values()}
    assert len(found) == 7 and len(distinct) == 4
    layer = "model.layers.0."
    assert found[layer + "self_attn.q_proj"] is found[layer + "self_attn.v_proj"]
    assert found[layer + "mlp.gate_proj"] is found[layer + "mlp.up_proj"]
    results = modifier.commit(scope)
    assert [result.name for result in results] == list(found)
    assert all(result.measure == "output" and result.scheme == "int4 group 32 symmetric" for result in results)
    assert modifier.statistics_of(layer + "mlp.up_proj") is None, "dropped with the commit"


def test_reported_errors_are_those_of_the_outputs() -> None:
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False)
    original = layer.weight.clone()
    rows = torch.randn(500, 64) * torch.linspace(0.1, 2, 64)
    model = nn.Sequential(layer)
    modifier = GPTQModifier(scheme="W4A16", group_size=16)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": layer})
    with modifier.observe(scope):
        model(rows)
    (result,) = modifier.commit(scope)
    wanted = rows @ original.T
    error = ((rows @ layer.weight.T - wanted).square().sum() / wanted.square().sum()).item()
    assert result.error == pytest.approx(error, rel=1e-3)


def test_padding_is_left_out_of_the_hessian() -> None:
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    model = nn.Sequential(layer)
    modifier = GPTQModifier(scheme="W4A16", group_size=8)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": layer})
    inputs = torch.randn(2, 5, 8)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    inputs[1, 2:] = float("nan")
    scope.batch.token_mask = real
    with modifier.observe(scope):
        model(inputs)
        model(inputs.reshape(10, 8))
    statistics = modifier.statistics_of("0")
    assert statistics is not None and statistics.hessian is not None
    rows = inputs[real]
    assert torch.allclose(statistics.hessian.full(), 2 * rows.T @ rows, atol=1e-4)


def test_modules_that_no_batch_reaches_are_rounded_with_a_note() -> None:
    model = nn.ModuleDict({"used": nn.Linear(32, 32), "expert": nn.Linear(32, 32)}).requires_grad_(False)
    modifier = GPTQModifier(scheme="W4A16", group_size=32)
    modifier.attach(model)
    scope = Scope(model, 0, dict(model.named_children()))
    with modifier.observe(scope):
        model["used"](torch.randn(100, 32))
    used, expert = modifier.commit(scope)
    assert used.measure == "output" and used.notes == ()
    assert expert.measure == "weight" and expert.notes == ("rounded to nearest: no calibration batch reached it",)


def test_inputs_that_are_all_zero_are_noted() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    modifier = GPTQModifier(scheme="W4A16", group_size=32)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": model[0]})
    with modifier.observe(scope):
        model(torch.zeros(10, 32))
    (result,) = modifier.commit(scope)
    assert result.notes == ("rounded to nearest: the Hessian is zero: every input of the calibration data was",)


def test_few_tokens_raise_the_damping_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    modifier = GPTQModifier(scheme="W4A16", group_size=32, dampening_frac=0.0)
    modifier.attach(model)
    scope = Scope(model, 0, {"0": model[0]})
    with modifier.observe(scope):
        model(torch.randn(4, 64))
    (result,) = modifier.commit(scope)
    assert result.measure == "output"
    assert len(result.notes) == 1 and result.notes[0].startswith("damping raised from 0 to")


def test_actorder_is_recorded_in_the_scheme() -> None:
    for asked, recorded in (("static", "static"), (None, None)):
        model = tiny_llama()
        GPTQModifier(scheme="W4A16", group_size=32, actorder=asked).attach(model)
        scheme = model.get_submodule("model.layers.0.mlp.up_proj").quantization_scheme
        assert scheme.weights.actorder == recorded  # type: ignore[union-attr]


def test_the_same_data_gives_the_same_bits() -> None:
    weights = []
    for _ in range(2):
        model = tiny_llama()
        calibrate(model, GPTQModifier(scheme="W4A16", group_size=32), BATCHES)
        weights.append(torch.cat([parameter.flatten().float() for parameter in model.parameters()]))
    assert torch.equal(*weights)
