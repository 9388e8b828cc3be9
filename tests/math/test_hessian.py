import pytest
import torch

from fxcalib.math.hessian import Hessian, strips

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_match_float64(dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 30, 24).to(dtype), torch.randn(5000, 24).to(dtype), torch.randn(3, 1, 7, 24).to(dtype)]
    hessian = Hessian(24, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch)
    rows = torch.cat([batch.reshape(-1, 24) for batch in batches]).double()
    exact = rows.T @ rows
    assert hessian.tokens == len(rows)
    assert hessian.full().dtype == torch.float32
    assert ((hessian.full() - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("width", [24, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_one_triangle_are_completed(width: int, dtype: torch.dtype, device: str) -> None:
    # tensor cores add the exact products of half precision in float32, but cut off more than they round
    tolerance = 1e-6 if device == "cpu" else 5e-6 if dtype == torch.float32 else 5e-5
    batches = [torch.randn(2, 300, width, device=device).to(dtype) for _ in range(3)]
    hessian = Hessian(width, torch.device(device))
    exact = torch.zeros(width, width, dtype=torch.float64, device=device)
    for batch in batches:
        hessian.add(batch)
        rows = batch.reshape(-1, width).double()
        exact += rows.T @ rows
        assert torch.allclose(hessian.sum_II.diagonal().double(), exact.diagonal(), rtol=1e-5)
        for each in (hessian.clone(), hessian):
            assert ((each.full() - exact).norm() / exact.norm()).item() < tolerance
    hessian.add(batches[0].float())
    rows = batches[0].reshape(-1, width).double()
    assert ((hessian.full() - exact - rows.T @ rows).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize(("device", "least"), [("cpu", 64), ("cuda", 1024)])
@pytest.mark.parametrize("width", [1, 24, 576, 1024, 1025, 4096, 11008, 14336, 28672])
def test_strips_make_up_the_width(width: int, device: str, least: int) -> None:
    parts = strips(width, torch.device(device))
    assert [row for part in parts for row in range(width)[part]] == list(range(width))
    assert len(parts) <= 8
    assert all(part.stop - part.start >= min(width, least) for part in parts[:-1])


def test_more_tokens_than_one_product_takes() -> None:
    inputs = torch.randn(20_000, 4)
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(inputs)
    assert torch.allclose(hessian.full(), inputs.T @ inputs, rtol=1e-4, atol=1e-2)


def test_a_clone_goes_its_own_way() -> None:
    hessian = Hessian(4, torch.device("cpu"))
    hessian.add(torch.eye(4))
    hessian.clone().add(torch.ones(3, 4))
    assert torch.equal(hessian.full(), torch.eye(4))
    assert hessian.tokens == 4
