import pytest
import torch

from fxcalib.math.hessian import Hessian


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_match_float64(dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 30, 24).to(dtype), torch.randn(5000, 24).to(dtype), torch.randn(3, 1, 7, 24).to(dtype)]
    hessian = Hessian(24, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch)
    rows = torch.cat([batch.reshape(-1, 24) for batch in batches]).double()
    exact = rows.T @ rows
    assert hessian.tokens == len(rows)
    assert hessian.sum_II.dtype == torch.float32
    assert ((hessian.sum_II - exact).norm() / exact.norm()).item() < 1e-6


def test_more_tokens_than_one_product_takes() -> None:
    inputs = torch.randn(20_000, 4)
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(inputs)
    assert torch.allclose(hessian.sum_II, inputs.T @ inputs, rtol=1e-4, atol=1e-2)


def test_a_clone_goes_its_own_way() -> None:
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(torch.eye(4))
    hessian.clone().add(torch.ones(3, 4))
    assert torch.equal(hessian.sum_II, torch.eye(4))
    assert hessian.tokens == 4
