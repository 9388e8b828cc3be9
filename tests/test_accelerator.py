"""Computing on an accelerator while model and intermediates live on the CPU."""

from __future__ import annotations

import pytest
import torch
from batches import token_batch
from tiny_llama import tiny_llama

from fxcalib import GPTQModifier, QuantizationModifier, calibrate, partition, trace

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


def test_a_model_that_lives_on_the_accelerator_stays_there() -> None:
    model = tiny_llama().cuda()
    calibrate(model, BATCHES, GPTQModifier(scheme="W4A16", group_size=32))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
