"""SparseGPT's solver against the paper's algorithm in float64, written with the explicit inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.math.gptq import factorize
from fxcalib.math.gptq import solve as quantize
from fxcalib.math.grids import Grid
from fxcalib.math.pruning import Pattern, prune_lowest
from fxcalib.math.qparams import QParams
from fxcalib.math.sparsegpt import Pruned, solve

OUT, WIDTH = 12, 64


def problem(seed: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * 0.3 + torch.eye(WIDTH)
    inputs = torch.randn(tokens, WIDTH, generator=generator) @ mixing * torch.rand(WIDTH, generator=generator)
    return weight, inputs.T @ inputs


def objective(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight.double() - other.double()
    return float(torch.trace(error @ hessian.double() @ error.T))


def paper_sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float | Pattern,
    *,
    damping: float = 0.01,
    block_size: int = WIDTH,
    keep_zeros: bool = False,
) -> torch.Tensor:
    """Algorithm 1: a mask from w^2 / [H^-1]_jj^2 at its first column, then w -= err [H^-1]_j / [H^-1]_jj."""
    work, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    run = sparsity.run if isinstance(sparsity, Pattern) else block_size
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % run == 0:
            own = slice(j, min(j + run, weight.shape[1]))
            scores = (work[:, own] / upper.diagonal()[own]).square()
            if keep_zeros:
                scores[weight[:, own] == 0] = -1
            if isinstance(sparsity, Pattern):
                for row in range(len(weight)):
                    lowest = scores[row].argsort()[: sparsity.run - sparsity.kept]
                    pruned[row, j + lowest] = True
            else:
                lowest = scores.flatten().argsort()[: round(sparsity * scores.numel())]
                pruned[:, own] |= torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, lowest, True).view_as(scores)
            if keep_zeros:
                pruned[:, own] |= weight[:, own] == 0
        error = torch.where(pruned[:, j], work[:, j], 0.0) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    work[pruned] = 0
    return work


def assert_equal(solution: Pruned, reference: torch.Tensor) -> None:
    """Equal but where two scores differ by less than the rounding of float32, which none of these problems has."""
    assert torch.equal(solution.weight_OI == 0, reference == 0)
    assert torch.allclose(solution.weight_OI.double(), reference, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.85])
@pytest.mark.parametrize("block_size", [1, 24, 64, 128])
def test_unstructured_equals_the_paper_in_float64(sparsity: float, block_size: int) -> None:
    weight, hessian = problem(0)
    solution = solve(weight, factorize(hessian, 0.01, "given"), sparsity, block_size=block_size)
    assert_equal(solution, paper_sparsegpt(weight, hessian, sparsity, block_size=min(block_size, WIDTH)))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(16, 32)], ids=str)
@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_patterns_equal_the_paper_in_float64(pattern: Pattern, block_size: int) -> None:
    weight, hessian = problem(1)
    solution = solve(weight, factorize(hessian, 0.01, "given"), pattern, block_size=block_size)
    assert pattern.fits(solution.weight_OI)
    assert_equal(solution, paper_sparsegpt(weight, hessian, pattern))


@pytest.mark.parametrize("sparsity", [0.5, Pattern(2, 4)], ids=str)
def test_zeros_that_are_there_are_kept(sparsity: float | Pattern) -> None:
    weight, hessian = problem(2)
    weight[torch.rand(weight.shape) < 0.3] = 0
    solution = solve(weight, factorize(hessian, 0.01, "given"), sparsity, keep_zeros=True, block_size=32)
    assert bool((solution.weight_OI[weight == 0] == 0).all())
    assert_equal(solution, paper_sparsegpt(weight, hessian, sparsity, block_size=32, keep_zeros=True))


def test_without_sparsity_nothing_changes() -> None:
    weight, hessian = problem(3)
    solution = solve(weight, factorize(hessian, 0.01, "given"), 0.0)
    assert torch.allclose(solution.weight_OI, weight)
    assert float(solution.error_O.sum()) == pytest.approx(0, abs=1e-3)


def test_stacked_weights_are_solved_as_if_alone() -> None:
    weight, hessian = problem(4)
    weight[:5] *= 10  # one threshold for both would prune none of these
    factor = factorize(hessian, 0.01, "given")
    together = solve(weight, factor, 0.5, parts=[5, OUT - 5], block_size=32)
    alone = [solve(weight[rows], factor, 0.5, block_size=32) for rows in (slice(0, 5), slice(5, OUT))]
    assert torch.allclose(together.weight_OI, torch.cat([each.weight_OI for each in alone]), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100_000), sparsity=st.sampled_from([0.25, 0.5, 0.8, Pattern(2, 4), Pattern(4, 8)]))
def test_output_error_is_below_pruning_by_magnitude(seed: int, sparsity: float | Pattern) -> None:
    weight, hessian = problem(seed)
    solution = solve(weight, factorize(hessian, 0.01, "given"), sparsity)
    magnitude = weight.abs()
    mask = (
        sparsity.mask(magnitude)
        if isinstance(sparsity, Pattern)
        else prune_lowest(magnitude, round(sparsity * weight.numel()))
    )
    assert int((solution.weight_OI == 0).sum()) == int(mask.sum())
    assert objective(weight, solution.weight_OI, hessian) < objective(weight, weight.masked_fill(mask, 0.0), hessian)


def test_reported_errors_are_without_the_damping() -> None:
    weight, hessian = problem(5)
    solution = solve(weight, factorize(hessian, 0.05, "given"), Pattern(2, 4))
    assert float(solution.error_O.sum()) == pytest.approx(objective(weight, solution.weight_OI, hessian), rel=1e-3)
    zero = torch.zeros_like(weight)
    assert float(solution.energy_O.sum()) == pytest.approx(objective(weight, zero, hessian), rel=1e-4)


def paper_gptq_of_pruned(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """GPTQ in float64 on a grid that holds zero alone where the weight is zero."""
    work, h = weight.double().clone(), hessian.double().clone()
    h += 0.01 * h.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    result = torch.zeros_like(work)
    for j in range(WIDTH):
        codes = (work[:, j] / scale).round().clamp(grid.low, grid.high)
        result[:, j] = torch.where(weight[:, j] == 0, 0.0, codes * scale)
        work[:, j:] -= ((work[:, j] - result[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return result


@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_gptq_keeps_zeros_and_passes_their_error_on(block_size: int) -> None:
    weight, hessian = problem(6)
    factor = factorize(hessian, 0.01, "given")
    sparse = solve(weight, factor, Pattern(2, 4)).weight_OI
    grid, scale = Grid("int", 4), 0.4
    scales = QParams(torch.full((OUT, 1), scale), None)
    solution = quantize(sparse, factor, grid, [0] * WIDTH, scales, block_size=block_size, pruned_OI=sparse == 0)
    assert bool((solution.weight_OI[sparse == 0] == 0).all())
    reference = paper_gptq_of_pruned(sparse, hessian, grid, scale)
    assert float(((solution.weight_OI - reference).abs() > 1e-4).double().mean()) < 0.02
    assert float(solution.error_O.sum()) == pytest.approx(objective(sparse, solution.weight_OI, hessian), rel=1e-3)
    nearest = (sparse / scale).round().clamp(grid.low, grid.high) * scale
    assert objective(sparse, solution.weight_OI, hessian) < objective(sparse, nearest, hessian)


def test_scales_that_gptq_finds_on_the_way_are_those_of_the_weights_that_are_left() -> None:
    weight, hessian = problem(7)
    factor = factorize(hessian, 0.01, "given")
    sparse = solve(weight, factor, Pattern(2, 4)).weight_OI
    seen: list[torch.Tensor] = []

    def search(columns: torch.Tensor, group: int) -> QParams:
        seen.append(columns)
        return QParams(columns.abs().amax(1) / 7, None)

    groups = [column // 16 for column in range(WIDTH)]
    solution = quantize(sparse, factor, Grid("int", 4), groups, search, pruned_OI=sparse == 0)
    assert torch.equal(torch.cat(seen, dim=1) == 0, sparse == 0)
    assert bool((solution.weight_OI[sparse == 0] == 0).all())
