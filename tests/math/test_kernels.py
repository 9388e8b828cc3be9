"""The kernels against the operations of torch that they stand for, on CUDA or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward

from fxcalib.math import kernels
from fxcalib.math.gptq import Factor, Order, Solution, Unfactorable, factorize, solve
from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, minmax_qparams, mse_qparams, quantize_, range_qparams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
TRITON = find_spec("triton") is not None
# The interpreter of older ones fails at a loop whose length is an argument, with numpy 2.4.
INTERPRETER = TRITON and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
runs = pytest.mark.skipif(not TRITON or not (INTERPRETED or DEVICE.type == "cuda"), reason="no CUDA device")
cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")

GRIDS = [
    Grid("int", 4),
    Grid("int", 3, symmetric=False),
    Grid("int", 8),
    Grid("float", 8),
    Grid("float", 6),
    Grid("float", 4),
]
OUT, WIDTH, GROUP = 13, 160, 32
COLUMNS = [column // GROUP for column in range(WIDTH)]
FP32 = ScaleFormat()


@pytest.mark.skipif(INTERPRETED or not INTERPRETER, reason="no Triton from 3.8, or this is the interpreter")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", __file__, "-n0", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are left to torch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.zeros(1))


@contextmanager
def fused() -> Iterator[None]:
    """Tensors of DEVICE go to the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
        assert kernels.available(torch.zeros(1, device=DEVICE))
        yield


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * 0.2 + torch.eye(WIDTH)
    inputs = torch.randn(500, WIDTH, generator=generator) @ mixing * torch.rand(WIDTH, generator=generator)
    return weight, inputs.T @ inputs


def scales_of(weight: torch.Tensor, grid: Grid) -> QParams:
    found = minmax_qparams(weight.reshape(-1, GROUP), grid, FP32)
    zero_point = None if found.zero_point is None else found.zero_point.reshape(OUT, -1)
    return QParams(found.scale.reshape(OUT, -1), zero_point)


def there(factor: Factor) -> Factor:
    moved = (t.to(DEVICE) for t in (factor.lower_II, factor.diagonal_I, factor.order_I, factor.damping_I))
    return Factor(*moved, factor.notes)


def assert_alike(found: Solution, expected: Solution, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    """Equal codes but for targets in the middle of two; where all of a channel's codes are, equal errors."""
    same = torch.isclose(found.weight_OI.cpu(), expected.weight_OI, rtol=1e-5, atol=1e-6)
    assert same.double().mean() > 0.99
    whole = same.all(1)
    assert whole.double().mean() > 0.7
    torch.testing.assert_close(found.error_O.cpu()[whole], expected.error_O[whole], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.energy_O.cpu(), expected.energy_O, rtol=1e-4, atol=1e-3)
    errors = [weight.double() - solution.weight_OI.cpu().double() for solution in (found, expected)]
    objectives = [float(((error @ hessian.double()) * error).sum()) for error in errors]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-5 if whole.all() else 1e-2)


def assert_nearest(found: Solution, weight: torch.Tensor, factor: Factor, grid: Grid, scales: QParams) -> None:
    """Every code is one nearest to what the codes after it ask for, computed in float64."""
    order = factor.order_I
    error = (weight - found.weight_OI.cpu()).double()[:, order]
    later = factor.lower_II.double() - torch.eye(WIDTH, dtype=torch.float64)
    target = weight.double()[:, order] + error @ later
    groups = torch.tensor(COLUMNS)[order]
    scale = scales.scale.double()[:, groups]
    zero = 0.0 if scales.zero_point is None else scales.zero_point.double()[:, groups]
    nearest = (grid.round_((target / scale + zero).float()).double() - zero) * scale
    missed = (target - found.weight_OI.cpu()[:, order]).abs() - (target - nearest).abs()
    assert (missed <= 1e-4 * scale).all()


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("order", "block_size"), [("activation", 128), ("activation", 24), ("given", 500)])
def test_solve_with_given_scales(grid: Grid, order: Order, block_size: int) -> None:
    weight, hessian = problem(0)
    factor, scales = factorize(hessian, 0.01, order), scales_of(weight, grid)
    expected = solve(weight, factor, grid, COLUMNS, scales, block_size=block_size)
    zero_point = None if scales.zero_point is None else scales.zero_point.to(DEVICE)
    with fused():
        moved = QParams(scales.scale.to(DEVICE), zero_point)
        found = solve(weight.to(DEVICE), there(factor), grid, COLUMNS, moved, block_size=block_size)
    assert_alike(found, expected, weight, hessian)
    assert_nearest(found, weight, factor, grid, scales)
    assert torch.equal(found.scale_OG.cpu(), scales.scale)


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
@pytest.mark.parametrize("block_size", [128, 48])
def test_solve_with_scales_found_on_the_way(grid: Grid, block_size: int) -> None:
    weight, hessian = problem(1)
    factor = factorize(hessian, 0.01, "given")

    def search(columns: torch.Tensor, group: int) -> QParams:
        return minmax_qparams(columns.contiguous(), grid, FP32)

    expected = solve(weight, factor, grid, COLUMNS, search, block_size=block_size)
    with fused():
        found = solve(weight.to(DEVICE), there(factor), grid, COLUMNS, search, block_size=block_size)
    assert_alike(found, expected, weight, hessian)
    torch.testing.assert_close(found.scale_OG.cpu(), expected.scale_OG, rtol=1e-3, atol=1e-5)
    assert (found.zero_point_OG is None) == grid.symmetric


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("order", ["given", "activation"])
def test_pruned_weights_become_zero(order: Order) -> None:
    weight, hessian = problem(3)
    grid, factor, pruned = (
        Grid("int", 4, symmetric=False),
        factorize(hessian, order=order),
        torch.rand(OUT, WIDTH) < 0.5,
    )
    scales = scales_of(weight.masked_fill(pruned, 0.0), grid)
    assert scales.zero_point is not None
    expected = solve(weight, factor, grid, COLUMNS, scales, pruned_OI=pruned)
    moved = QParams(scales.scale.to(DEVICE), scales.zero_point.to(DEVICE))
    with fused():
        found = solve(weight.to(DEVICE), there(factor), grid, COLUMNS, moved, pruned_OI=pruned.to(DEVICE))
    assert bool((found.weight_OI.cpu()[pruned] == 0).all())
    assert_alike(found, expected, weight, hessian)


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_one_scale_of_a_whole_channel_and_values_that_are_not_finite() -> None:
    weight, hessian = problem(2)
    weight[3, 40], weight[4, 0] = float("nan"), 1e15
    factor, grid = factorize(hessian), Grid("int", 4)
    scales = QParams(torch.full((OUT, 1), 0.2), None)
    expected = solve(weight, factor, grid, [0] * WIDTH, scales)
    with fused():
        found = solve(weight.to(DEVICE), there(factor), grid, [0] * WIDTH, QParams(scales.scale.to(DEVICE), None))
    for a, b in ((found.weight_OI, expected.weight_OI), (found.error_O, expected.error_O)):
        assert torch.equal(a.cpu().isnan(), b.isnan())
    assert float(found.weight_OI[4, 0]) == float(expected.weight_OI[4, 0]) == pytest.approx(0.2 * grid.high)
    assert torch.isclose(found.weight_OI.cpu()[5:], expected.weight_OI[5:]).double().mean() > 0.99


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("rows", "elements", "period", "dtype"),
    [
        (30, 48, None, torch.bfloat16),
        (30, 128, 6, torch.float16),
        (3, 5000, None, torch.float32),
        (1, 20_000, 1, torch.bfloat16),
        (6, 4500, 3, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("grid", "norm"), [*((grid, 2.0) for grid in GRIDS), (GRIDS[0], 2.4), (GRIDS[1], 1.0)])
def test_errors_of_candidates(
    rows: int, elements: int, period: int | None, dtype: torch.dtype, grid: Grid, norm: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(rows, elements, generator=generator).to(dtype)
    table[0, :3] *= 20
    importance = None if period is None else torch.rand(period, elements, generator=generator)
    low, high = (end.float() for end in torch.aminmax(table, dim=-1))
    factors = torch.linspace(0.3, 1.1, 5)[:, None]
    scale, zero_point = range_qparams(factors * low, factors * high, grid, ScaleFormat(torch.bfloat16))
    zero = None if zero_point is None else zero_point[..., None]
    values = table.float().expand(5, -1, -1)
    missed = (quantize_(values.clone(), scale[..., None], zero, grid).double() - values).abs() ** norm
    if importance is not None:
        missed *= importance.repeat(rows // importance.shape[0], 1)
    with fused():
        found = kernels.candidate_errors(
            table.to(DEVICE),
            scale.to(DEVICE),
            None if zero_point is None else zero_point.to(DEVICE),
            grid,
            None if importance is None else importance.to(DEVICE),
            norm,
        )
    torch.testing.assert_close(found.cpu().double(), missed.sum(-1), rtol=1e-5, atol=1e-12)


@runs
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_scales(grid: Grid) -> None:
    table = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    importance = torch.rand(4, 64)
    expected = mse_qparams(table, grid, ScaleFormat(torch.bfloat16), importance_RE=importance)
    with fused():
        table, importance = table.to(DEVICE), importance.to(DEVICE)
        found = mse_qparams(table, grid, ScaleFormat(torch.bfloat16), importance_RE=importance)
    assert (found.scale.cpu() == expected.scale).double().mean() > 0.9


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All of two bytes, NaN and infinity among them; of four a sample, with codes, ties and what is next to them."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(6)).to(torch.int32)
    ties = torch.arange(-2000, 2000).float() / 4
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (-1e9, 1e9)]
    extremes = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    return torch.cat([bits.view(dtype), ties, ties / 256, *near, extremes, torch.randn(10_000) * 50])


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e-7, 0.0, 41.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("grid", "zero_point"),
    [(Grid("float", 8), None), (Grid("int", 8), None), (Grid("int", 8, symmetric=False), -37), (Grid("int", 4), None)],
)
def test_quantized_activations_are_those_of_compressed_tensors_to_the_bit(
    grid: Grid, zero_point: int | None, dtype: torch.dtype, scale: float
) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    args = QuantizationArgs(num_bits=grid.bits, type=grid.kind, symmetric=grid.symmetric, strategy="tensor")
    values, scales = every_value(dtype).to(DEVICE), torch.tensor([scale], dtype=dtype, device=DEVICE)
    zero = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int8, device=DEVICE)
    for given in (values, values[:-3].reshape(-1, 1), values[1:2]):
        expected = forward.fake_quantize(given, scales, zero, args)
        with fused():
            found = kernels.fake_quantize(given, scales, zero, grid)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert ((found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())).all()


@pytest.mark.skipif(TRITON, reason="Triton is there")
def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not kernels.available(torch.zeros(1))


@cuda
@pytest.mark.parametrize("order", ["given", "activation"])
def test_a_factor_equals_that_of_the_cpu(order: Order) -> None:
    _, hessian = problem(4)
    hessian[7] = hessian[:, 7] = 0
    expected, found = factorize(hessian, 0.01, order), factorize(hessian.cuda(), 0.01, order)
    assert torch.equal(found.order_I.cpu(), expected.order_I)
    torch.testing.assert_close(found.lower_II.cpu(), expected.lower_II, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.diagonal_I.cpu(), expected.diagonal_I, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.damping_I.cpu(), expected.damping_I)


@cuda
def test_hessians_beyond_repair_are_refused_and_singular_ones_damped() -> None:
    inputs = torch.randn(3, WIDTH, device="cuda")
    assert factorize(inputs.T @ inputs, dampening_frac=0.0).notes[0].startswith("damping raised from 0 to")
    spoiled = torch.eye(WIDTH, device="cuda")
    spoiled[5, 5] = float("nan")
    with pytest.raises(Unfactorable, match="NaN or infinity"):
        factorize(spoiled)
    spoiled[5, 5], spoiled[4, 5], spoiled[5, 4] = 1.0, float("nan"), float("nan")
    with pytest.raises(Unfactorable, match="not positive definite even with damping 1"):
        factorize(spoiled)
    with pytest.raises(Unfactorable, match="zero"):
        factorize(torch.zeros(8, 8, device="cuda"))


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_a_solve_does_not_wait_for_the_device(grid: Grid) -> None:
    weight, hessian = problem(5)
    factor, weight = factorize(hessian.cuda()), weight.cuda()

    def search_and_solve() -> None:
        found = mse_qparams(weight.reshape(-1, GROUP), grid, FP32)
        zero_point = None if found.zero_point is None else found.zero_point.reshape(OUT, -1)
        solve(weight, factor, grid, COLUMNS, QParams(found.scale.reshape(OUT, -1), zero_point))

    search_and_solve()  # builds the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        search_and_solve()
    finally:
        torch.cuda.set_sync_debug_mode("default")
