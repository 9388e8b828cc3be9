"""The hot loops of quantization as fused kernels, where Triton compiles for the device of the tensors.

Each does what the operations of torch beside its call do, which serve every other device, up to the order of sums.

Axes: O output channels, B columns of a block, G scales of one output channel, S scales, E elements that share one,
R rows of importance, K candidates.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fxcalib.math.grids import Grid

BLOCK_LIMIT = 128
"""Most columns of a block: a program holds the errors of them all in registers."""

# Channels of one program of `solve_columns`, a single warp: no two threads wait for each other through memory.
_CHANNELS = 8
# Elements of one tile of `candidate_errors`, and of the longest rows that are one tile whole.
_TILE = 2048
_WHOLE_ROW = 4096
# Values of one program of `fake_quantize`.
_VALUES = 2048
# Long rows are shared by as many programs as give a device this much to do.
_PROGRAMS = 1024


def available(tensor: Tensor) -> bool:
    """Whether the kernels run where `tensor` is: on CUDA, or anywhere in Triton's interpreter (TRITON_INTERPRET=1).

    Without Triton they do not. A Triton that cannot build kernels there is named in a warning, once.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (tensor.is_cuda or interpreted) and _builds(tensor.device)


def solve_columns(
    targets_BO: Tensor,
    originals_BO: Tensor,
    quantized_BO: Tensor,
    errors_BO: Tensor,
    lower_BB: Tensor,
    diagonal_B: Tensor,
    groups_B: Tensor,
    columns: range,
    scales_GO: Tensor,
    zeros_GO: Tensor | None,
    grid: Grid,
    loss_O: Tensor,
    pruned_BO: Tensor | None = None,
) -> None:
    """Quantize `columns` of a block of a GPTQ solve, a run of them from the last to the first, and add their loss.

    Args:
        targets_BO, originals_BO: what the columns after the block ask for, and the weight.
        quantized_BO, errors_BO: written where `columns` are; errors of the columns of the block after them are read.
        lower_BB, diagonal_B: the block's part of the factor.
        groups_B: int32, each column's row of `scales_GO` and `zeros_GO`.
        pruned_BO: bool, rows contiguous, true where a weight becomes zero.
    All others are float32, rows of O contiguous.
    """
    from fxcalib.math import triton_kernels

    width, out = targets_BO.shape
    programs = -(-out // _CHANNELS)
    with torch.cuda.device_of(targets_BO):
        # Sums and products stay apart so that errors are those of the weight as it is stored.
        triton_kernels.solve_columns[(programs,)](
            targets_BO,
            originals_BO,
            quantized_BO,
            errors_BO,
            lower_BB,
            diagonal_B,
            scales_GO,
            scales_GO if zeros_GO is None else zeros_GO,
            groups_B,
            loss_O,
            loss_O if pruned_BO is None else pruned_BO,
            out,
            *lower_BB.stride(),
            width,
            columns.stop,
            len(columns),
            HAS_ZERO=zeros_GO is not None,
            PRUNES=pruned_BO is not None,
            **_codes(grid),
            BLOCK=_power_of_two(width),
            TILE=_CHANNELS,
            num_warps=1,
            enable_fp_fusion=False,
        )


def candidate_errors(
    table_SE: Tensor,
    scale_KS: Tensor,
    zero_KS: Tensor | None,
    grid: Grid,
    importance_RE: Tensor | None,
    norm: float,
) -> Tensor:
    """sum_e importance_e |x_e - q(x_e)|^norm of each candidate for each row of `table_SE`, (K, S) float32.

    `importance_RE`: row s has row s % R. Every tile of the table is read once for all candidates.
    """
    from fxcalib.math import triton_kernels

    (count, elements), candidates = table_SE.shape, len(scale_KS)
    whole = elements <= _WHOLE_ROW
    columns = _power_of_two(elements) if whole else _TILE
    rows = max(_TILE // columns, 1)
    tiles, runs = -(-count // rows), -(-elements // columns)
    chunks = -(-runs // max(min(runs, _PROGRAMS // tiles), 1))
    parts = -(-runs // chunks)
    scale_KS = scale_KS.contiguous()
    errors_PKS = torch.empty(parts, candidates, count, device=table_SE.device)
    with torch.cuda.device_of(table_SE):
        triton_kernels.candidate_errors[(tiles, parts)](
            table_SE,
            scale_KS,
            scale_KS if zero_KS is None else zero_KS.contiguous(),
            scale_KS if importance_RE is None else importance_RE.float().contiguous(),
            errors_PKS,
            count,
            elements,
            *table_SE.stride(),
            candidates,
            chunks,
            1 if importance_RE is None else len(importance_RE),
            float(norm),
            HAS_ZERO=zero_KS is not None,
            WEIGHTED=importance_RE is not None,
            SQUARED=norm == 2.0,
            WHOLE=whole,
            **_codes(grid),
            ROWS=rows,
            COLUMNS=columns,
            CANDIDATES=1 if whole else _power_of_two(candidates),
        )
    return errors_PKS[0] if parts == 1 else errors_PKS.sum(0)


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """`values` quantized and dequantized, bit for bit what compressed-tensors' `fake_quantize` makes of them.

    Args:
        values: of any shape, contiguous, bfloat16, float16 or float32.
        scale, zero_point: (1,), of the dtype of `values`, and int8.
        grid: integers, or floats of 8 bits.
    """
    from fxcalib.math import triton_kernels

    quantized = torch.empty_like(values)
    count = values.numel()
    with torch.cuda.device_of(values):
        triton_kernels.fake_quantize[(-(-count // _VALUES),)](
            values,
            scale,
            scale if zero_point is None else zero_point,
            quantized,
            count,
            HAS_ZERO=zero_point is not None,
            **_codes(grid),
            BLOCK=_VALUES,
            enable_fp_fusion=False,
        )
    return quantized


def _codes(grid: Grid) -> dict[str, Any]:
    """The constants of a grid: of `float` ones bits of fraction and the smallest biased exponent of a normal number."""
    fraction_bits, smallest = -1, 0
    if grid.kind == "float":
        fraction_bits, smallest = {8: (3, 121), 6: (3, 127), 4: (1, 127)}[grid.bits]
    return {"LOW": grid.low, "HIGH": grid.high, "FRACTION_BITS": fraction_bits, "SMALLEST": smallest}


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _builds(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    value = torch.zeros(1, device=device)
    try:
        from fxcalib.math import triton_kernels

        with torch.cuda.device_of(value):
            triton_kernels.probe[(1,)](value)
    except Exception as error:  # no compiler, no headers, a device that is too old: each has its own type
        warnings.warn(
            f"Triton cannot build kernels for {device}, so weights are quantized by slower operations of torch: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True
