import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import mse_qparams
from fxcalib.math.ranges import Histogram, MinMax

INT8 = Grid("int", 8)
FP32 = ScaleFormat()


def test_extremes_run_over_batches_and_skip_padding() -> None:
    real = torch.tensor([[True, True, False]])
    statistic = MinMax()
    statistic.add(torch.tensor([[[1.0, -2.0], [3.0, 0.5], [float("nan"), 900.0]]]), real)
    statistic.add(torch.tensor([[[-5.0, 1.0], [2.0, 2.5], [77.0, 77.0]]]), real)
    assert [end.tolist() for end in statistic.extremes()] == [[-5.0], [3.0]]
    assert statistic.qparams(INT8, FP32).scale.tolist() == pytest.approx([5 / 127.5])


def test_a_clone_goes_its_own_way() -> None:
    for statistic in (MinMax(), Histogram(), Histogram(99.0)):
        statistic.add(torch.randn(10, 4), None)
        before = statistic.qparams(INT8, FP32).scale.clone()
        statistic.clone().add(torch.randn(10, 4) * 1000, None)
        assert torch.equal(statistic.qparams(INT8, FP32).scale, before)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 1000))
def test_histograms_do_not_depend_on_the_order_of_batches_much(sizes: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(50, 8, generator=generator) * size for size in sizes]
    forward, backward = Histogram(99.0), Histogram(99.0)
    for batch in batches:
        forward.add(batch, None)
    for batch in reversed(batches):
        backward.add(batch, None)
    exact = torch.cat([batch.flatten().abs() for batch in batches]).quantile(0.99)
    width = torch.cat(batches).abs().max() / 1024
    for statistic in (forward, backward):
        reach = statistic.qparams(INT8, FP32).scale * 127.5
        assert (reach - exact).abs() <= 2 * width + 0.02 * exact + exact * 0.1


def test_percentiles_of_a_histogram() -> None:
    values = torch.linspace(-1, 1, 20_001)[:, None]
    outlier = torch.tensor([[40.0]])
    statistic = Histogram(99.0)
    statistic.add(values, None)
    statistic.add(outlier, None)
    assert statistic.qparams(INT8, FP32).scale[0] * 127.5 == pytest.approx(0.99, abs=0.03)
    low_high = Histogram(99.0)
    low_high.add(values + 1, None)
    found = low_high.qparams(Grid("int", 8, symmetric=False), FP32)
    assert found.scale[0] * 255 == pytest.approx(1.99, abs=0.02)
    assert found.zero_point is not None and found.zero_point[0] == -128


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_histogram_search_agrees_with_the_search_over_all_values(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40_000, generator=generator)
    values[:40] *= 10
    grid = Grid("int", 4, symmetric=symmetric)
    statistic = Histogram()
    for part in values.split(5000):
        statistic.add(part[:, None], None)
    found, exact = statistic.qparams(grid, FP32), mse_qparams(values[None], grid, FP32, smallest=0.05, coarse=60)
    assert found.scale.item() == pytest.approx(exact.scale.item(), rel=0.06)


def test_padding_does_not_count_in_a_histogram() -> None:
    values = torch.linspace(0.01, 1, 1000).reshape(10, 100, 1)
    padded = torch.cat([values, torch.full((10, 900, 1), float("nan"))], 1)
    real = torch.arange(1000).expand(10, 1000) < 100
    with_padding, without = Histogram(50.0), Histogram(50.0)
    with_padding.add(padded, real)
    without.add(values, None)
    assert torch.allclose(with_padding.qparams(INT8, FP32).scale, without.qparams(INT8, FP32).scale)
