import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, minmax_qparams, mse_qparams, percentile_qparams, quantize_

FP32 = ScaleFormat()
BF16 = ScaleFormat(torch.bfloat16)
GRIDS = [
    Grid("int", 4),
    Grid("int", 3, symmetric=False),
    Grid("int", 8),
    Grid("int", 8, symmetric=False),
    Grid("float", 8),
    Grid("float", 4),
]


def quantized(table: torch.Tensor, found: QParams, grid: Grid) -> torch.Tensor:
    zero_point = None if found.zero_point is None else found.zero_point[:, None]
    return quantize_(table.clone(), found.scale[:, None], zero_point, grid)


def error(table: torch.Tensor, found: QParams, grid: Grid, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    return (weights * (quantized(table, found, grid) - table).square()).sum(-1)


def values(seed: int, rows: int = 8, elements: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, elements, generator=generator)
    # Some rows with outliers, one all positive, one zero.
    table[0, :2] *= 20
    table[1] = table[1].abs() + 1
    table[2] = 0
    return table


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_searched_error_is_never_above_min_max(grid: Grid, seed: int) -> None:
    table = values(seed)
    weights = torch.rand(4, 48, generator=torch.Generator().manual_seed(seed))
    for importance in (None, weights):
        whole = 1.0 if importance is None else importance.repeat(2, 1)
        searched = error(table, mse_qparams(table, grid, BF16, importance_RE=importance), grid, whole)
        plain = error(table, minmax_qparams(table, grid, BF16), grid, whole)
        assert (searched <= plain * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_search_comes_close_to_an_exhaustive_one(grid: Grid) -> None:
    table = values(3)[3:].double()
    low, high = table.amin(-1).clamp(max=0), table.amax(-1).clamp(min=0)
    best = torch.full((len(table),), float("inf"), dtype=torch.float64)
    for factor in torch.linspace(0.3, 1.1, 1000, dtype=torch.float64):
        if grid.symmetric:
            scale, zero = factor * torch.maximum(-low, high) / ((grid.high - grid.low) / 2), torch.zeros_like(low)
        else:
            scale = factor * (high - low) / (grid.high - grid.low)
            zero = (grid.low - factor * low / scale).round().clamp(grid.low, grid.high)
        codes = (table / scale[:, None] + zero[:, None]).round().clamp(grid.low, grid.high)
        best = torch.minimum(best, ((codes - zero[:, None]) * scale[:, None] - table).square().sum(-1))
    found = error(table.float(), mse_qparams(table.float(), grid, FP32), grid)
    assert (found <= best * 1.05).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stay_on_the_grid(grid: Grid) -> None:
    table = values(1) * 100
    found = mse_qparams(table, grid, BF16)
    codes = quantized(table, found, grid) / found.scale[:, None]
    if found.zero_point is not None:
        codes += found.zero_point[:, None]
        assert torch.equal(found.zero_point, found.zero_point.round())
        assert (found.zero_point >= grid.low).all() and (found.zero_point <= grid.high).all()
    if grid.kind == "int":
        assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.min() >= grid.low - 1e-3 and codes.max() <= grid.high + 1e-3
    assert torch.equal(found.scale, found.scale.to(torch.bfloat16).float()), "rounded before it is used"


def test_e2m1_rounds_to_its_sixteen_values() -> None:
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    inputs = torch.linspace(-7, 7, 2801)
    rounded = Grid("float", 4).round_(inputs.clone())
    levels = torch.cat([-magnitudes, magnitudes])
    distance = (inputs.clamp(-6, 6)[:, None] - levels).abs()
    assert torch.allclose((inputs.clamp(-6, 6) - rounded).abs(), distance.amin(1), atol=1e-6)
    assert set(rounded.abs().tolist()) == set(magnitudes.tolist())


def test_e4m3_saturates_at_448() -> None:
    assert Grid("float", 8).round_(torch.tensor([1000.0, -1e9, 17.3])).tolist() == [448.0, -448.0, 18.0]
    assert Grid("float", 6).round_(torch.tensor([9.0, -0.1, 3.6, 5.2, 1.1])).tolist() == [7.5, -0.125, 3.5, 5.0, 1.125]


def test_min_max_follows_compressed_tensors() -> None:
    table = values(5)
    symmetric = minmax_qparams(table, Grid("int", 4), FP32)
    assert torch.allclose(symmetric.scale[3], table[3].abs().max() / 7.5)
    found = minmax_qparams(table, Grid("int", 4, symmetric=False), FP32)
    assert found.zero_point is not None
    assert torch.allclose(found.scale[1], table[1].max() / 15), "zero is always inside the range"
    assert found.zero_point[1] == -8
    assert (quantized(table, found, Grid("int", 4, symmetric=False))[3] - table[3]).abs().max() <= found.scale[3]


def test_rows_of_zeros_get_a_scale_that_divides() -> None:
    for scales in (FP32, BF16, ScaleFormat(torch.bfloat16, power_of_two=True)):
        found = mse_qparams(torch.zeros(2, 32), Grid("float", 4), scales)
        assert (found.scale > 0).all()
        assert torch.equal(quantized(torch.zeros(2, 32), found, Grid("float", 4)), torch.zeros(2, 32))


def test_microscaling_scales_are_powers_of_two() -> None:
    table = values(2)
    for grid in (Grid("float", 4), Grid("float", 8)):
        found = mse_qparams(table, grid, ScaleFormat(torch.bfloat16, power_of_two=True))
        assert torch.equal(torch.exp2(torch.log2(found.scale).round()), found.scale)


def test_two_level_scales_are_rounded_below_their_global_scale() -> None:
    table = values(4)
    scales = ScaleFormat(torch.float8_e4m3fn, global_scale=torch.tensor([100.0]))
    found = mse_qparams(table, Grid("float", 4), scales)
    stored = scales.stored(found.scale)
    assert torch.equal(stored, stored.to(torch.float8_e4m3fn).float())
    assert torch.equal(scales.effective(stored), found.scale)


def test_percentile_clips_the_outliers() -> None:
    table = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([50.0])])[None]
    grid = Grid("int", 8)
    assert percentile_qparams(table, grid, FP32, 99.0).scale[0] == pytest.approx(0.99 / 127.5, rel=0.01)
    assert percentile_qparams(table, grid, FP32, 100.0).scale[0] == pytest.approx(50 / 127.5)
    asymmetric = percentile_qparams(table, Grid("int", 8, symmetric=False), FP32, 99.0)
    assert asymmetric.scale[0] == pytest.approx(1.98 / 255, rel=0.01)


def test_long_rows_are_searched_in_parts() -> None:
    table = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    grid = Grid("int", 4)
    found = mse_qparams(table, grid, FP32)
    # The best clipping of a normal distribution at 16 levels steps by about a third of a deviation.
    assert found.scale.tolist() == pytest.approx([0.335, 0.335], abs=0.015)
