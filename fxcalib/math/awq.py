"""AWQ: scales that protect the weights of salient input channels, and clipping of the weights, for least output error.

Lin et al. 2023, "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration". With H the
second moments X^T X of a layer's inputs, the squared error of its outputs is tr((Q - W) H (Q - W)^T), so candidates are
compared without running the data again.

Axes: O output channels, I input channels, C channels of the source, G groups of E input channels, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, quantize_, range_qparams

# Elements of candidate weights that are held at once.
_CHUNK = 1 << 24


def relative_magnitude(weight_OI: Tensor, group_size: int) -> Tensor:
    """(I,) float32: the mean over output channels of |w| relative to the largest in its group of `group_size`."""
    out, width = weight_OI.shape
    grouped = weight_OI.float().abs().reshape(out, width // group_size, group_size)
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)


def awq_scales(activation_C: Tensor, weight_C: Tensor | None, ratio: float) -> Tensor:
    """s_c = x_c^ratio / w_c^(1 - ratio), or x_c^ratio without `weight_C`; normalized so that sqrt(max s min s) = 1.

    `activation_C` (C,): the magnitude of each channel's activations; `weight_C` (C,): that of the weights that read it.
    Section 3.2 of the paper has the activations alone (equation 5); its code divides by the weights as well. A channel
    that was zero in all the data keeps its scale.
    """
    activation_C = activation_C.float()
    alive = activation_C > 0
    scale_C = activation_C.clamp(min=1e-12) ** ratio
    if weight_C is not None:
        scale_C = scale_C / weight_C.float().clamp(min=1e-4) ** (1 - ratio)
    scale_C = scale_C.clamp(1e-4, 1e4)
    known = torch.where(alive, scale_C, scale_C[alive].median() if bool(alive.any()) else 1.0)
    return torch.where(alive, scale_C / (known.amax() * known.amin()).sqrt(), 1.0)


def output_error(difference_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """tr(D H D^T) as a 0-dim tensor: the squared error of the outputs for a difference D of the weights."""
    return (difference_OI @ hessian_II).mul_(difference_OI).sum()


def clip_groups(
    weight_OI: Tensor,
    hessian_II: Tensor,
    group_size: int,
    grid: Grid,
    scales: ScaleFormat,
    *,
    smallest: float = 0.5,
    steps: int = 20,
) -> QParams:
    """Scales and zero points (O, G) of the clipped range of each group that has the least error of the outputs.

    Each group's range shrinks from its extremes to `smallest` of them in `steps` steps (section 4.1's code of the
    paper clips so); on symmetric integer grids a range in which the largest magnitude meets the last code is tried as
    well. The error of a group is that of its own columns: d H_G d^T with its block H_G of the second moments.
    """
    width = weight_OI.shape[1]
    groups = width // group_size
    blocks_GEGE = hessian_II.reshape(groups, group_size, groups, group_size)
    blocks_GEE = blocks_GEGE.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors = [1 - (1 - smallest) * step / steps for step in range(steps)]
    if grid.symmetric:
        factors.insert(1, grid.half_range / grid.high)
    rows = max(_CHUNK // width, 1)
    found = [
        _clip_rows(part.float().reshape(-1, groups, group_size), blocks_GEE, factors, grid, scales)
        for part in torch.split(weight_OI, rows)
    ]
    zeros = [each.zero_point for each in found if each.zero_point is not None]
    return QParams(torch.cat([each.scale for each in found]), torch.cat(zeros) if zeros else None)


def _clip_rows(
    weight_OGE: Tensor, blocks_GEE: Tensor, factors: list[float], grid: Grid, scales: ScaleFormat
) -> QParams:
    low_OG, high_OG = torch.aminmax(weight_OGE, dim=-1)
    best: QParams | None = None
    least_OG: Tensor | None = None
    for factor in factors:
        candidate = range_qparams(low_OG * factor, high_OG * factor, grid, scales)
        zero_OG = candidate.zero_point
        quantized = quantize_(
            weight_OGE.clone(), candidate.scale[..., None], None if zero_OG is None else zero_OG[..., None], grid
        )
        difference_GOE = quantized.sub_(weight_OGE).transpose(0, 1)
        error_OG = torch.bmm(difference_GOE, blocks_GEE).mul_(difference_GOE).sum(-1).t()
        if best is None or least_OG is None:
            best, least_OG = candidate, error_OG
            continue
        better = error_OG < least_OG
        least_OG = torch.where(better, error_OG, least_OG)
        zero = best.zero_point
        if zero is not None and zero_OG is not None:
            zero = torch.where(better, zero_OG, zero)
        best = QParams(torch.where(better, candidate.scale, best.scale), zero)
    assert best is not None
    return best
