"""GPTQ's solver against the paper's algorithm in float64, written with the explicit inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.math.gptq import Order, Solution, Unfactorable, factorize, solve
from fxcalib.math.granularity import Granularity
from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, minmax_qparams, mse_qparams, quantize_

OUT, WIDTH, GROUP = 12, 64, 16
GROUPS = Granularity("group", columns=GROUP)
COLUMNS = GROUPS.group_of_column(WIDTH)
FP32 = ScaleFormat()


def problem(seed: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * 0.3 + torch.eye(WIDTH)
    inputs = torch.randn(tokens, WIDTH, generator=generator) @ mixing * torch.rand(WIDTH, generator=generator)
    return weight, inputs.T @ inputs


def scales_of(weight: torch.Tensor, grid: Grid) -> QParams:
    found = minmax_qparams(GROUPS.table(weight), grid, FP32)
    shape = GROUPS.shape(weight.shape)
    return QParams(found.scale.reshape(shape), None if found.zero_point is None else found.zero_point.reshape(shape))


def objective(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight.double() - quantized.double()
    return float(torch.trace(error @ hessian.double() @ error.T))


def paper_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: QParams | None, damping: float, order: Order
) -> torch.Tensor:
    """Algorithm 1 with blocks of one column: w -= err [H^-1]_j / [H^-1]_jj by the Cholesky factor of the inverse.

    Without `scales` each group's min-max scale is taken when its first column is reached.
    """
    work, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    columns = list(range(WIDTH))
    if order == "activation":
        columns = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(h[columns][:, columns])
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(work)
    found: QParams | None = None
    for position, column in enumerate(columns):
        group = column // GROUP
        if scales is None and column % GROUP == 0:
            found = minmax_qparams(work[:, column : column + GROUP].float(), grid, FP32)
        scale = scales.scale[:, group] if scales is not None else found.scale  # type: ignore[union-attr]
        zero = scales.zero_point if scales is not None else found.zero_point  # type: ignore[union-attr]
        shift = torch.zeros(OUT) if zero is None else zero[:, group] if scales is not None else zero
        codes = (work[:, column] / scale.double() + shift.double()).round().clamp(grid.low, grid.high)
        result[:, column] = (codes - shift.double()) * scale.double()
        missed = (work[:, column] - result[:, column]) / upper[position, position]
        for later in range(position + 1, WIDTH):
            work[:, columns[later]] -= missed * upper[position, later]
    return result


def differing(solution: Solution, reference: torch.Tensor) -> float:
    return float(((solution.weight_OI - reference).abs() > 1e-4).double().mean())


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("grid", [Grid("int", 4), Grid("int", 3, symmetric=False), Grid("int", 8)], ids=str)
@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_codes_equal_the_paper_in_float64(order: Order, grid: Grid, block_size: int) -> None:
    weight, hessian = problem(0)
    scales = scales_of(weight, grid)
    solution = solve(weight, factorize(hessian, 0.01, order), grid, COLUMNS, scales, block_size=block_size)
    reference = paper_gptq(weight, hessian, grid, scales, 0.01, order)
    # A value within float32 rounding of the middle of two codes may fall to the other side; then the rest follows.
    assert differing(solution, reference) < 0.02
    assert objective(weight, solution.weight_OI, hessian) <= objective(weight, reference, hessian) * 1.001


@pytest.mark.parametrize("grid", [Grid("int", 4), Grid("int", 4, symmetric=False)], ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 64])
def test_scales_found_on_the_way_equal_the_paper(grid: Grid, block_size: int) -> None:
    weight, hessian = problem(1)
    solution = solve(
        weight,
        factorize(hessian, 0.01, "given"),
        grid,
        COLUMNS,
        lambda columns, group: minmax_qparams(columns.contiguous(), grid, FP32),
        block_size=block_size,
    )
    reference = paper_gptq(weight, hessian, grid, None, 0.01, "given")
    close = (solution.weight_OI - reference).abs() < 1e-3
    assert close.double().mean() > 0.98
    assert objective(weight, solution.weight_OI, hessian) <= objective(weight, reference, hessian) * 1.01
    assert solution.scale_OG.shape == (OUT, WIDTH // GROUP)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100_000), bits=st.sampled_from([2, 3, 4, 8]), order=st.sampled_from(["given", "activation"]))
def test_output_error_is_below_round_to_nearest(seed: int, bits: int, order: Order) -> None:
    weight, hessian = problem(seed)
    grid = Grid("int", bits)
    found = mse_qparams(GROUPS.table(weight), grid, FP32)
    scales = QParams(found.scale.reshape(OUT, -1), None)
    solution = solve(weight, factorize(hessian, 0.01, order), grid, COLUMNS, scales)
    tiles = quantize_(weight.clone().reshape(OUT, -1, GROUP), scales.scale[:, :, None], None, grid)
    nearest = tiles.reshape(OUT, WIDTH)
    assert objective(weight, solution.weight_OI, hessian) < objective(weight, nearest, hessian)
    codes = (solution.weight_OI.reshape(OUT, -1, GROUP) / scales.scale[:, :, None]).reshape(OUT, WIDTH)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.min() >= grid.low - 1e-3 and codes.max() <= grid.high + 1e-3


def test_reported_errors_are_without_the_damping() -> None:
    weight, hessian = problem(2)
    grid = Grid("int", 4)
    solution = solve(weight, factorize(hessian, 0.05), grid, COLUMNS, scales_of(weight, grid))
    assert float(solution.error_O.sum()) == pytest.approx(objective(weight, solution.weight_OI, hessian), rel=1e-3)
    assert float(solution.energy_O.sum()) == pytest.approx(
        objective(weight, torch.zeros_like(weight), hessian), rel=1e-4
    )


def test_stacked_weights_are_solved_as_if_alone() -> None:
    weight, hessian = problem(3)
    grid = Grid("int", 4, symmetric=False)
    scales = scales_of(weight, grid)
    factor = factorize(hessian)
    together = solve(weight, factor, grid, COLUMNS, scales)
    assert scales.zero_point is not None
    alone = [
        solve(weight[rows], factor, grid, COLUMNS, QParams(scales.scale[rows], scales.zero_point[rows]))
        for rows in (slice(0, 5), slice(5, OUT))
    ]
    parts = torch.cat([part.weight_OI for part in alone])
    assert float(((parts - together.weight_OI).abs() > 1e-5).double().mean()) < 0.01


def test_dead_channels_are_rounded_to_nearest_and_disturb_nothing() -> None:
    weight, hessian = problem(4)
    dead = [3, 17, 40]
    alive = [column for column in range(WIDTH) if column not in dead]
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = Grid("int", 4)
    scales = scales_of(weight, grid)
    solution = solve(weight, factorize(hessian), grid, COLUMNS, scales)
    expected = quantize_(weight[:, dead].clone(), scales.scale[:, [COLUMNS[c] for c in dead]], None, grid)
    assert torch.allclose(solution.weight_OI[:, dead], expected)
    mean = hessian.diagonal().mean()
    kept = hessian[alive][:, alive]
    damping = 0.01 * float(mean) / float(kept.diagonal().mean())
    without = solve(weight[:, alive], factorize(kept, damping), grid, [COLUMNS[c] for c in alive], scales)
    assert float(((without.weight_OI - solution.weight_OI[:, alive]).abs() > 1e-5).double().mean()) < 0.02


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weight, _ = problem(5)
    inputs = torch.randn(3, WIDTH)
    factor = factorize(inputs.T @ inputs, dampening_frac=0.0)
    assert len(factor.notes) == 1 and factor.notes[0].startswith("damping raised from 0 to")
    grid = Grid("int", 4)
    assert torch.isfinite(solve(weight, factor, grid, COLUMNS, scales_of(weight, grid)).weight_OI).all()


def test_hessians_beyond_repair_are_refused() -> None:
    _, hessian = problem(6)
    spoiled = hessian.clone()
    spoiled[5, 5] = float("nan")
    with pytest.raises(Unfactorable, match="NaN or infinity"):
        factorize(spoiled)
    spoiled = hessian.clone()
    spoiled[4, 5] = spoiled[5, 4] = float("nan")
    with pytest.raises(Unfactorable, match="not positive definite even with damping 1"):
        factorize(spoiled)
    with pytest.raises(Unfactorable, match="zero"):
        factorize(torch.zeros(8, 8))


def test_importance_is_the_variance_that_later_channels_leave_unexplained() -> None:
    _, hessian = problem(7)
    factor = factorize(hessian, 0.0, "activation")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    h = hessian.double()
    for position in (0, 10, 62):
        column, later = order[position], order[position + 1 :]
        explained = h[column, later] @ torch.linalg.solve(h[later][:, later], h[later, column])
        assert float(factor.importance()[column]) == pytest.approx(float(h[column, column] - explained), rel=1e-2)
