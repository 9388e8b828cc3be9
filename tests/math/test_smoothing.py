"""SmoothQuant's and AWQ's numerics against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcalib.math.awq import awq_scales, clip_groups, output_error, relative_magnitude
from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.smoothing import (
    divide_gain_,
    factors_of_reader,
    keep,
    largest_along,
    largest_by_channel,
    multiply_,
    smoothquant_scales,
    sum_by_channel,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_scales_are_equation_4(strength: float) -> None:
    x_NC, w_OC = randn(50, 12), randn(7, 12, seed=1)
    expected = x_NC.double().abs().amax(0) ** strength / w_OC.double().abs().amax(0) ** (1 - strength)
    found = smoothquant_scales(x_NC.abs().amax(0), largest_along(w_OC, 1), strength)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_channels_without_activations_or_weights_keep_their_scale() -> None:
    activation, weight = torch.tensor([0.0, 2.0, 3.0, 1e9]), torch.tensor([1.0, 0.0, 3.0, 1e-9])
    found = smoothquant_scales(activation, weight, 0.5)
    assert found[:3].tolist() == [1.0, 1.0, 1.0]
    assert found[3] == 1e4  # bounded


def test_statistics_of_readers_are_gathered_by_channel() -> None:
    index = torch.tensor([0, 2, 0, -1, 2, 2])
    values = torch.tensor([1.0, 5.0, 3.0, 100.0, 2.0, 4.0])
    assert largest_by_channel(values, index, 4).tolist() == [3.0, 0.0, 5.0, 0.0]
    assert sum_by_channel(values, index, 4).tolist() == [4.0, 0.0, 11.0, 0.0]
    scale = torch.tensor([2.0, 3.0, 4.0, 5.0])
    assert factors_of_reader(scale, index).tolist() == [2.0, 4.0, 2.0, 1.0, 4.0, 4.0]
    assert keep(scale, (1, 3)).tolist() == [2.0, 1.0, 4.0, 1.0]


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 1), ((4, 6, 5), 2), ((4, 5, 6), 1)])
def test_multiplying_a_weight_rounds_once(shape: tuple[int, ...], axis: int) -> None:
    weight, factor = randn(*shape).bfloat16(), torch.exp(randn(5, seed=1))
    before = weight.clone()
    assert torch.equal(largest_along(weight, axis), weight.float().abs().movedim(axis, -1).reshape(-1, 5).amax(0))
    multiply_(weight, factor, axis)
    exact = before.double().movedim(axis, -1) * factor.double()
    assert torch.equal(weight.movedim(axis, -1), exact.float().bfloat16())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_dividing_a_gain(offset: float) -> None:
    gain, scale = randn(5), torch.exp(randn(5, seed=1))
    expected = (gain.double() + offset) / scale.double() - offset
    divide_gain_(gain, scale, offset)
    assert torch.allclose(gain.double(), expected, atol=1e-6)
    rows = randn(5, 3)
    by_rows = rows.double() / scale.double()[:, None]
    divide_gain_(rows, scale, 0.0)
    assert torch.allclose(rows.double(), by_rows, atol=1e-6)


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.35, 1.0])
def test_awq_scales(duo: bool, ratio: float) -> None:
    x_C, w_C = randn(16).abs() + 0.1, randn(16, seed=1).abs() + 0.1
    plain = x_C.double() ** ratio
    if duo:
        plain = plain / w_C.double() ** (1 - ratio)
    expected = plain / (plain.max() * plain.min()).sqrt()
    found = awq_scales(x_C, w_C if duo else None, ratio)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_awq_scales_of_dead_channels() -> None:
    found = awq_scales(torch.tensor([0.0, 1.0, 4.0]), None, 0.5)
    assert found.tolist() == pytest.approx([1.0, 2**-0.5, 2**0.5])
    assert awq_scales(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1.0, 1.0, 1.0]


def test_relative_magnitude_is_per_group() -> None:
    w = randn(3, 8)
    expected = torch.zeros(8, dtype=torch.float64)
    for row in w.double():
        for start in (0, 4):
            group = row[start : start + 4].abs()
            expected[start : start + 4] += group / group.max() / 3
    assert torch.allclose(relative_magnitude(w, 4).double(), expected, atol=1e-6)


def test_output_error_is_that_of_the_outputs() -> None:
    x_NI, d_OI = randn(40, 8), randn(5, 8, seed=1)
    expected = (x_NI.double() @ d_OI.double().T).square().sum()
    assert float(output_error(d_OI, x_NI.T @ x_NI)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("grid", [Grid("int", 4), Grid("int", 4, symmetric=False), Grid("float", 4)])
def test_clipping_finds_the_range_of_least_error(grid: Grid) -> None:
    """Against every candidate tried by itself, for each output channel and group, on the data."""
    mixing = randn(8, 8, seed=3)
    x_NI = (randn(60, 16).reshape(60, 2, 8) @ mixing).reshape(60, 16).double()
    w_OI = randn(6, 16, seed=1) ** 3
    found = clip_groups(w_OI, (x_NI.T @ x_NI).float(), 8, grid, ScaleFormat())
    factors = [1 - step / 40 for step in range(20)] + ([grid.half_range / grid.high] if grid.symmetric else [])
    for o in range(6):
        for g in range(2):
            columns = slice(8 * g, 8 * g + 8)
            row, x = w_OI[o, columns].double(), x_NI[:, columns]
            errors = []
            for factor in factors:
                low, high = min(row.min().item(), 0.0) * factor, max(row.max().item(), 0.0) * factor
                if grid.symmetric:
                    scale, zero = max(-low, high) / grid.half_range, 0.0
                else:
                    scale = (high - low) / (grid.high - grid.low)
                    zero = min(max(round(grid.low - low / scale), grid.low), grid.high)
                errors.append(_error(row, x, scale, zero, grid))
            scale = float(found.scale[o, g])
            zero = 0.0 if found.zero_point is None else float(found.zero_point[o, g])
            assert _error(row, x, scale, zero, grid) == pytest.approx(min(errors), rel=1e-3, abs=1e-9)


def _error(row: Tensor, x: Tensor, scale: float, zero: float, grid: Grid) -> float:
    codes = grid.round_((row / scale + zero).float()).double()
    return float((x @ ((codes - zero) * scale - row)).square().sum())
