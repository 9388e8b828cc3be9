"""Computing on an accelerator while model and intermediates live on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import token_batch
from tiny_llama import tiny_llama
from torch import nn

from fxcalib import GPTQModifier, QuantizationModifier, calibrate, partition, trace
from fxcalib.intermediates import Intermediates
from fxcalib.modifiers.fused_inputs import FusedInputs
from fxcalib.weights import Residency

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BATCHES = [token_batch(2, 16, seed=i, left=3 * (i % 2)) for i in range(4)]


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_the_model_returns_to_the_cpu_and_equals_its_cpu_calibration(offload: str) -> None:
    here, there = tiny_llama(), tiny_llama()
    calibrate(here, BATCHES, QuantizationModifier(scheme="FP8"), device="cpu")
    report = calibrate(there, BATCHES, QuantizationModifier(scheme="FP8"), device="cuda", offload=offload)
    assert report.peak_device_bytes > 0
    assert {t.device.type for t in [*there.parameters(), *there.buffers()]} == {"cpu"}
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_is_as_good_as_on_the_cpu(dtype: torch.dtype) -> None:
    here, there = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    cpu = calibrate(here, BATCHES, GPTQModifier(scheme="W4A16", group_size=32), device="cpu")
    cuda = calibrate(there, BATCHES, GPTQModifier(scheme="W4A16", group_size=32), device="cuda")
    errors = [sum(m.error or 0 for m in report.modules) for report in (cpu, cuda)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("left", [0, 3])
def test_a_model_on_the_accelerator_runs_bit_for_bit(left: int) -> None:
    model = tiny_llama().cuda()
    batches = [{k: v.cuda() for k, v in token_batch(2, 16, seed=s, left=left).items()} for s in range(2)]
    parts = partition(trace(model, {**batches[0], "use_cache": False}))
    with torch.no_grad():
        assert torch.equal(
            parts.run({**batches[1], "use_cache": False}).logits, model(**batches[1], use_cache=False).logits
        )


class Stepping(nn.Module):
    """Its own code writes to buffers, which stay on the CPU, and branches on what it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total[:8] += 1
        self.total += x.mean(0)
        x = self.layers[0](x * self.total if self.total.sum() > 0 else x)
        return self.layers[1](x)


def test_buffers_that_the_glue_writes_to_are_written_where_they_are() -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(4, 16) + shift} for shift in (1, -3, 2)]
    here, there = Stepping(), Stepping()
    there.load_state_dict(here.state_dict())
    for model, device in ((here, "cpu"), (there, "cuda")):
        calibrate(model, batches, QuantizationModifier(scheme="FP8"), targets="Linear", device=device)
    assert there.total.device.type == "cpu" and there.total.abs().sum() > 0
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_that_lives_on_the_accelerator_stays_there() -> None:
    model = tiny_llama().cuda()
    calibrate(model, BATCHES, GPTQModifier(scheme="W4A16", group_size=32))
    assert {p.device.type for p in model.parameters()} == {"cuda"}


@pytest.mark.parametrize("precise", [False, True])
def test_intermediates_survive_any_order_of_copies_and_computing(precise: bool) -> None:
    """Long kernels before every write and read: a copy that does not wait for its tensor, or frees it early, shows."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(64, 1024), (1024, 64), (3, 5), (256, 1024)]
    store, expected = Intermediates(device, torch.device("cpu")), []
    for i in range(12):
        value = torch.randn(shapes[i % 4], generator=generator, device=device)
        expected.append(value.double().sum().item())
        store.append({"x": value.cpu()})
    for step in range(6):
        for i in range(12):
            x = store.load(i, ["x"])["x"]
            store.prefetch((i + 1) % 12, ["x"])
            torch.cuda._sleep(200_000)
            y = x + 1
            torch.cuda._sleep(200_000)
            noise = torch.full_like(y, float("nan"))  # what reuses memory too early reads this
            store.store(i, {"x": y.t().contiguous().t() if step % 2 else y})
            store.free(i, ["gone"])
            del x, y, noise
            store.pace()
            if precise:
                torch.cuda.synchronize()
    for i in range(12):
        found = store.load(i, ["x"])["x"]
        assert found.double().sum().item() == pytest.approx(expected[i] + 6 * found.numel(), abs=1e-3)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_where_intermediates_lie_changes_no_bit(scheme: str) -> None:
    states = []
    for offload in ("cpu", "none", "auto"):
        model = tiny_llama(dtype=torch.bfloat16)
        modifier = QuantizationModifier(scheme="FP8") if scheme == "FP8" else GPTQModifier(scheme=scheme, group_size=32)
        report = calibrate(model, BATCHES, modifier, device="cuda", offload=offload, profile=True)
        assert sum(report.profile.values()) == pytest.approx(report.timings["calibrate"], rel=0.1)
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(value, other[name]) for other in states[1:]), name


def test_weights_that_two_subgraphs_share_are_there_for_both() -> None:
    model = tiny_llama().to(torch.float32)
    residency = Residency(model, torch.device("cuda"))
    first, second = model.model.layers[0], model.model.layers[1]
    second.mlp = first.mlp
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(20):
        residency.load(0, [first])
        residency.wait(0)
        residency.load(1, [second])
        residency.unload(0)
        residency.wait(1)
        assert {p.device.type for p in second.parameters()} == {"cuda"}
        residency.load(2, [first])
        residency.unload(1)
        residency.wait(2)
        assert {p.device.type for p in first.parameters()} == {"cuda"}
        residency.unload(2)
    residency.unload_all()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("kind", "symmetric"), [("float", True), ("int", True), ("int", False)])
def test_inputs_quantized_by_one_kernel_change_no_bit(
    kind: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": symmetric}
    scheme = {"weights": {"num_bits": 8, "type": kind, "strategy": "channel"}, "input_activations": inputs}
    replaced: list[int] = []
    replace = FusedInputs.replace
    states, logits = [], []
    for fused in (True, False):

        def chosen(self: FusedInputs, modules: list[Any], fused: bool = fused) -> None:
            if fused:
                replace(self, modules)
                replaced.append(len(self._replaced))

        monkeypatch.setattr(FusedInputs, "replace", chosen)
        model = tiny_llama(dtype=torch.bfloat16).cuda()
        calibrate(model, BATCHES, GPTQModifier(scheme=scheme))
        states.append(model.state_dict())
        with torch.no_grad():
            logits.append(model(**{k: v.cuda() for k, v in BATCHES[0].items()}, use_cache=False).logits)
    assert max(replaced) == sum("input_scale" in name for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.equal(*logits)
