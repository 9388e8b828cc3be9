"""Scales and zero points of a table of values: min-max, and the search for the clipping range of least error.

Axes: S scales, E elements that share one, R rows of importance (R divides S), K candidate scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxcalib.math import kernels
from fxcalib.math.grids import Grid, ScaleFormat

# Elements handled at once: the temporaries of one step stay in the second-level cache of a CPU core. An accelerator
# wants few, large kernels instead.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 24


class QParams(NamedTuple):
    """Scale and zero point, both (S,) float32; the scale is the factor of the codes, rounded as it will be stored."""

    scale: Tensor
    zero_point: Tensor | None
    """None for symmetric grids."""


def quantize_(values: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Replace float32 `values` by their nearest representable ones, in place; `scale` and `zero_point` broadcast."""
    values.div_(scale)
    if zero_point is None:
        return grid.round_(values).mul_(scale)
    return grid.round_(values.add_(zero_point)).sub_(zero_point).mul_(scale)


def range_qparams(low: Tensor, high: Tensor, grid: Grid, scales: ScaleFormat) -> QParams:
    """Scale and zero point that cover [low, high] (both of one shape, float32) and zero.

    Symmetric: max(|low|, |high|) maps to half of the code range, as compressed-tensors' `calculate_qparams` has it.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if grid.symmetric:
        largest = torch.maximum(-low, high)
        divisor = _microscaling_divisor(grid) if scales.power_of_two else grid.half_range
        return QParams(scales.effective(scales.stored(largest / divisor)), None)
    # The rounded scale may be smaller than asked: the zero point follows it, not the unrounded one.
    scale = scales.effective(scales.stored((high - low) / (grid.high - grid.low)))
    zero_point = torch.round(grid.low - low / scale).clamp_(grid.low, grid.high)
    return QParams(scale, zero_point)


def minmax_qparams(table_SE: Tensor, grid: Grid, scales: ScaleFormat) -> QParams:
    """Scale and zero point that cover every element of each row of `table_SE` (S, E)."""
    low, high = torch.aminmax(table_SE, dim=-1)
    return range_qparams(low.float(), high.float(), grid, scales)


def mse_qparams(
    table_SE: Tensor,
    grid: Grid,
    scales: ScaleFormat,
    *,
    importance_RE: Tensor | None = None,
    norm: float = 2.0,
    smallest: float = 0.35,
    coarse: int = 14,
    fine: int = 6,
) -> QParams:
    """Scale and zero point of least error sum_e importance_e |x_e - q(x_e)|^norm, row by row of `table_SE` (S, E).

    A grid search of the clipping range (the `mse` observers of Nagel et al. 2021, "A white paper on neural network
    quantization", section 3.1): `coarse` ranges from `smallest` times the min-max range to a little above it, equal
    ratios apart, then `fine` ones around the best. The min-max range is always a candidate, so the error is never
    above min-max's. `importance_RE` (R, E) weighs the elements, row s by its row s % R.
    """
    low, high = (end.float() for end in torch.aminmax(table_SE, dim=-1))
    if scales.power_of_two:
        factors = torch.ones(3, device=low.device)
        factors[1], factors[2] = 0.5, 2.0
        _, best = _best_factor(table_SE, low, high, factors[:, None], grid, scales, importance_RE, norm)
        return best
    # A symmetric integer grid can hold the largest magnitude exactly: codes reach 7 of 7.5.
    largest = grid.half_range / grid.high if grid.symmetric else 1.0
    step = (largest / smallest) ** (1.0 / (coarse - 1))
    exponents = torch.arange(coarse, device=low.device, dtype=torch.float32)
    factors = torch.cat([torch.ones(1, device=low.device), largest * step**-exponents])
    best_factor, best = _best_factor(table_SE, low, high, factors[:, None], grid, scales, importance_RE, norm)
    if not fine:
        return best
    offsets = torch.arange(1, fine + 2, device=low.device, dtype=torch.float32) * (2.0 / (fine + 1)) - 1.0
    around = best_factor * (step**offsets)[:, None]
    around[-1] = best_factor
    _, best = _best_factor(table_SE, low, high, around, grid, scales, importance_RE, norm)
    return best


def percentile_qparams(table_SE: Tensor, grid: Grid, scales: ScaleFormat, percentile: float) -> QParams:
    """Scale and zero point of the range that holds `percentile` percent of the elements of each row (S, E).

    Symmetric grids clip the magnitude, asymmetric ones half of the rest at either end.
    """
    table_SE = table_SE.float()
    if grid.symmetric:
        high = _quantile(table_SE.abs(), percentile / 100)
        return range_qparams(-high, high, grid, scales)
    rest = (1 - percentile / 100) / 2
    return range_qparams(_quantile(table_SE, rest), _quantile(table_SE, 1 - rest), grid, scales)


def _microscaling_divisor(grid: Grid) -> float:
    """Largest power of two that the grid holds, times sqrt(2) / (7/4): rounds up from 1.75 (OCP reference rounding)."""
    largest = 256.0 if grid.bits == 8 else 4.0
    return largest * 1.75 / 2**0.5


def _quantile(values_SE: Tensor, q: float) -> Tensor:
    """`torch.quantile` without its limit on the number of elements: the nearest order statistic of each row."""
    count = values_SE.shape[-1]
    return torch.kthvalue(values_SE, min(max(round(q * count), 1), count), dim=-1).values


def _best_factor(
    table_SE: Tensor,
    low_S: Tensor,
    high_S: Tensor,
    factors_KS: Tensor,
    grid: Grid,
    scales: ScaleFormat,
    importance_RE: Tensor | None,
    norm: float,
) -> tuple[Tensor, QParams]:
    """The factor (S,) of the min-max range with the least error, and the scale and zero point it gives."""
    candidates = range_qparams(factors_KS * low_S, factors_KS * high_S, grid, scales)
    errors_KS = _errors(table_SE, candidates, grid, importance_RE, norm)
    best_1S = errors_KS.argmin(0, keepdim=True)
    factor = factors_KS.expand_as(errors_KS).gather(0, best_1S)[0]
    scale = candidates.scale.gather(0, best_1S)[0]
    zero_point = None if candidates.zero_point is None else candidates.zero_point.gather(0, best_1S)[0]
    return factor, QParams(scale, zero_point)


def _errors(table_SE: Tensor, candidates_KS: QParams, grid: Grid, importance_RE: Tensor | None, norm: float) -> Tensor:
    """Error of each candidate for each row (K, S), tile by tile so that the temporaries stay in cache."""
    if kernels.available(table_SE):
        return kernels.candidate_errors(table_SE, *candidates_KS, grid, importance_RE, norm)
    count, elements = table_SE.shape
    chunk = _CPU_CHUNK if table_SE.device.type == "cpu" else _DEVICE_CHUNK
    width = min(elements, chunk)
    if table_SE.device.type == "cpu":
        chunk *= torch.get_num_threads()  # each has its own cache
    period = 1 if importance_RE is None else importance_RE.shape[0]
    height = max(chunk // width // period, 1) * period
    # The error is a weighted norm: the weights go inside it.
    weights_RE = None if importance_RE is None else importance_RE.float() ** (1.0 / norm)
    errors_KS = torch.zeros_like(candidates_KS.scale)
    for top in range(0, count, height):
        rows = slice(top, min(top + height, count))
        repeats = (rows.stop - rows.start) // period
        scale_KS = candidates_KS.scale[:, rows, None]
        zero_KS = None if candidates_KS.zero_point is None else candidates_KS.zero_point[:, rows, None]
        for left in range(0, elements, width):
            columns = slice(left, min(left + width, elements))
            values = table_SE[rows, columns].float()
            weights = None if weights_RE is None else weights_RE[:, columns].repeat(repeats, 1)
            buffer = torch.empty_like(values)
            for k, scale in enumerate(scale_KS):
                quantize_(buffer.copy_(values), scale, None if zero_KS is None else zero_KS[k], grid).sub_(values)
                if weights is not None:
                    buffer.mul_(weights)
                errors_KS[k, rows] += torch.linalg.vector_norm(buffer, norm, dim=-1) ** norm
    return errors_KS
