"""Modules whose inputs one kernel quantizes while fxcalib runs them, on CUDA or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle import forward
from layerwise import calibrate, scope_of, tiny_llama, token_batches
from torch import nn

from fxcalib.modifiers import QuantizationModifier
from fxcalib.modifiers.fused_inputs import FusedInputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
TRITON = find_spec("triton") is not None
INTERPRETER = TRITON and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
runs = pytest.mark.skipif(not TRITON or not (INTERPRETED or DEVICE.type == "cuda"), reason="no CUDA device")

INT8 = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False)
UP = "model.layers.0.mlp.up_proj"
BATCHES = [batch.to(DEVICE) for batch in token_batches()]


@pytest.mark.skipif(INTERPRETED or not INTERPRETER, reason="no Triton from 3.8, or this is the interpreter")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", __file__, "-n0", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


class Linear(nn.Linear):
    """Remembers what it was given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen = input
        return super().forward(input)


def committed(scale: float = 0.05, scheme: QuantizationScheme | None = None) -> Linear:
    module = Linear(16, 4, device=DEVICE).requires_grad_(False)
    scheme = scheme or QuantizationScheme(targets=["Linear"], input_activations=INT8)
    initialize_module_for_quantization(module, scheme, force_zero_point=False)
    module.quantization_status = QuantizationStatus.DECOMPRESSED
    for name, value in (("input_scale", scale), ("input_zero_point", -5)):
        if hasattr(module, name):
            getattr(module, name).data.fill_(value)
    return module


def expected(module: Linear, inputs: torch.Tensor) -> torch.Tensor:
    return forward.fake_quantize(inputs, module.input_scale, module.input_zero_point, INT8)


def fused(*modules: Linear, statistics: list[object | None]) -> FusedInputs:
    found = FusedInputs()
    found.replace([(m, m.quantization_scheme, s) for m, s in zip(modules, statistics, strict=True)])
    return found


@runs
def test_modules_of_one_statistic_share_what_they_read_and_others_do_not() -> None:
    statistic = object()
    q, k, other, alone = modules = [committed() for _ in range(4)]
    fused(*modules, statistics=[statistic, statistic, object(), None])
    for shape in ((3, 16), (2, 5, 16)):
        inputs = torch.randn(shape, device=DEVICE)
        for module in modules:
            module(inputs)
            assert torch.equal(module.seen, expected(module, inputs))
        assert q.seen is k.seen
        assert len({id(module.seen) for module in (k, other, alone)}) == 3


@runs
def test_inputs_that_change_in_place_are_quantized_again() -> None:
    statistic = object()
    q, k, v = modules = [committed() for _ in range(3)]
    fused(*modules, statistics=[statistic] * 3)
    inputs = torch.randn(3, 16, device=DEVICE)
    q(inputs)
    inputs.mul_(2)
    k(inputs)
    assert torch.equal(k.seen, expected(k, inputs))
    k.seen.zero_()
    v(inputs)
    assert torch.equal(v.seen, expected(v, inputs))
    with torch.inference_mode():
        made = torch.randn(3, 16, device=DEVICE)
        q(made)
        made.mul_(2)
        k(made)
        assert torch.equal(k.seen, expected(k, made))


@runs
@pytest.mark.parametrize("readers", [1, 2])
def test_quantized_inputs_are_kept_no_longer_than_the_inputs_or_until_all_have_read_them(readers: int) -> None:
    statistic = object()
    modules = [committed(), committed()]
    fused(*modules, statistics=[statistic] * 2)
    inputs = torch.randn(3, 16, device=DEVICE)
    for module in modules[:readers]:
        module(inputs)
    kept = weakref.ref(modules[0].seen)
    for module in modules[:readers]:
        del module.seen
    assert (kept() is None) == (readers == 2)
    del inputs
    assert kept() is None


@runs
def test_what_the_kernel_does_not_take_goes_the_old_way() -> None:
    module = committed()
    before = module.forward
    fused(module, statistics=[None])
    wide = torch.randn(3, 32, device=DEVICE)
    for inputs in (wide[:, ::2], wide[:0, :16], wide.t()[:16].t(), nn.Parameter(wide[:, :16].contiguous())):
        assert torch.equal(module(inputs), before(inputs))
    narrow = wide[:, :16].to(torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(module(narrow), before(narrow))
        assert module.seen.dtype == torch.float32


@runs
def test_only_static_inputs_of_plain_modules_are_served_and_forwards_come_back() -> None:
    dynamic = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    nibbles = QuantizationArgs(num_bits=4, type="float", strategy="tensor")
    schemes = [
        QuantizationScheme(targets=["Linear"], weights=INT8),
        QuantizationScheme(targets=["Linear"], input_activations=dynamic),
        QuantizationScheme(targets=["Linear"], input_activations=nibbles),
        QuantizationScheme(targets=["Linear"], input_activations=INT8, output_activations=INT8),
    ]
    modules = [committed(scheme=scheme) for scheme in schemes]
    wrapped, served, taken = committed(), committed(), committed()
    wrapped.__dict__["forward"] = lambda input: input
    before = [module.__dict__["forward"] for module in (*modules, wrapped, served)]
    found = fused(*modules, wrapped, served, taken, statistics=[None] * 7)
    now = [module.__dict__["forward"] for module in (*modules, wrapped, served)]
    assert [a is b for a, b in zip(before, now, strict=True)] == [True] * 5 + [False]
    taken.__dict__["forward"] = mine = taken.forward.__wrapped__
    found.restore()
    assert all(m.__dict__["forward"] is b for m, b in zip((*modules, wrapped, served), before, strict=True))
    assert taken.__dict__["forward"] is mine


@pytest.mark.parametrize("through", [True, False], ids=["to the end", "to an error"])
def test_a_modifier_leaves_the_forward_that_compressed_tensors_put_there(through: bool) -> None:
    model = tiny_llama().to(DEVICE)
    modifier = QuantizationModifier(scheme="FP8")
    modifier.attach(model)
    module = model.get_submodule(UP)
    attached, keys = module.__dict__["forward"], set(module.__dict__)
    scope = scope_of(model, "" if through else "model.layers.0")
    with modifier.observe(scope), torch.no_grad():
        model(BATCHES[0])
    modifier.commit(scope)
    served = TRITON and (INTERPRETED or DEVICE.type == "cuda")
    assert (module.__dict__["forward"] is not attached) == served
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        during = model(BATCHES[0]).logits
    handle.remove()
    assert calls == [1]
    modifier.detach(model)
    assert module.__dict__["forward"] is attached
    assert set(module.__dict__) == keys - {"quantization_enabled"}
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]).logits, during)


@runs
@pytest.mark.parametrize("scheme", ["FP8", "INT8"])
def test_a_calibration_gives_the_same_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"num_bits": 8, "strategy": "channel"}
    given = "FP8" if scheme == "FP8" else {"weights": weights, "input_activations": INT8.model_dump()}
    states = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(FusedInputs, "replace", lambda self, modules: None)
        model = tiny_llama().to(DEVICE)
        calibrate(model, QuantizationModifier(scheme=given, weight_observer="minmax"), BATCHES)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
