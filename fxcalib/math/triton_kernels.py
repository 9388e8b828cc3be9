"""The kernels of `fxcalib.math.kernels`. Only that module imports this one, once a tensor is where Triton runs.

Axes: O output channels, B columns of a block, S scales, E elements that share one, R rows of importance, K candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: a float32 of magnitude below 2^22 loses its fraction, ties to even, when this is added and taken off.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_EXPONENT = tl.constexpr(23)
_ROUNDER_FRACTION = tl.constexpr(0x400000)


@triton.jit
def _nearest(codes, LOW: tl.constexpr, HIGH: tl.constexpr, FRACTION_BITS: tl.constexpr, SMALLEST: tl.constexpr):
    """Nearest code, ties to even; NaN stays. Integers if FRACTION_BITS < 0, else floats of that many bits of fraction.

    SMALLEST is the biased exponent below which the step of a float grid shrinks no more.
    """
    codes = tl.where(codes < LOW, LOW, tl.where(codes > HIGH, HIGH, codes))
    if FRACTION_BITS < 0:
        rounder = _ROUNDER
    else:
        exponent = (codes.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.maximum(exponent, SMALLEST) - FRACTION_BITS + _ROUNDER_EXPONENT
        rounder = ((exponent << 23) | _ROUNDER_FRACTION).to(tl.float32, bitcast=True)
    return (codes + rounder) - rounder


@triton.jit(do_not_specialize=["width", "stop", "count"])
def solve_columns(
    target_ptr,  # (B, O) float32: the weight as the columns after the block have updated it
    original_ptr,  # (B, O) float32
    quantized_ptr,  # (B, O) float32, written
    error_ptr,  # (B, O) float32, written; read from row `stop`
    lower_ptr,  # (B, B) float32
    diagonal_ptr,  # (B,) float32
    scale_ptr,  # (G, O) float32
    zero_ptr,  # (G, O) float32, if HAS_ZERO
    group_ptr,  # (B,) int32
    loss_ptr,  # (O,) float32, added to
    pruned_ptr,  # (B, O) bool, if PRUNES
    out,
    lower_row,
    lower_column,
    width,
    stop,
    count,
    HAS_ZERO: tl.constexpr,
    PRUNES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize columns `stop` - 1 down to `stop` - `count` of a block of `width` columns, TILE channels a program."""
    channels = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = channels < out
    rows = tl.arange(0, BLOCK)
    within = rows < width
    # The errors stay in registers: row b is zero until column b is reached.
    errors = tl.load(
        error_ptr + rows[:, None] * out + channels[None, :],
        mask=((rows >= stop) & within)[:, None] & inside[None, :],
        other=0.0,
    )
    loss = tl.zeros((TILE,), tl.float32)
    at = stop - 1
    lower = tl.load(lower_ptr + rows * lower_row + at * lower_column, mask=within, other=0.0)
    group = tl.load(group_ptr + at)
    for _ in range(count):
        # What the next column needs is on its way while this one is computed.
        ahead = tl.maximum(at - 1, 0)
        next_lower = tl.load(lower_ptr + rows * lower_row + ahead * lower_column, mask=within, other=0.0)
        next_group = tl.load(group_ptr + ahead)
        row = at * out + channels
        target = tl.load(target_ptr + row, mask=inside, other=0.0)
        original = tl.load(original_ptr + row, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + group * out + channels, mask=inside, other=1.0)
        diagonal = tl.load(diagonal_ptr + at)
        target += tl.sum(errors * lower[:, None], axis=0)
        code = tl.div_rn(target, scale)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + group * out + channels, mask=inside, other=0.0)
            quantized = (_nearest(code + zero, LOW, HIGH, FRACTION_BITS, SMALLEST) - zero) * scale
        else:
            quantized = _nearest(code, LOW, HIGH, FRACTION_BITS, SMALLEST) * scale
        if PRUNES:
            quantized = tl.where(tl.load(pruned_ptr + row, mask=inside, other=0) != 0, 0.0, quantized)
        error = original - quantized
        tl.store(quantized_ptr + row, quantized, mask=inside)
        tl.store(error_ptr + row, error, mask=inside)
        errors = tl.where(rows[:, None] == at, error[None, :], errors)
        missed = (target - quantized) * diagonal
        loss += missed * missed
        at -= 1
        lower = next_lower
        group = next_group
    tl.store(loss_ptr + channels, tl.load(loss_ptr + channels, mask=inside, other=0.0) + loss, mask=inside)


@triton.jit(do_not_specialize=["candidates", "chunks", "period"])
def candidate_errors(
    table_ptr,  # (S, E) any floating dtype
    scale_ptr,  # (K, S) float32
    zero_ptr,  # (K, S) float32, if HAS_ZERO
    importance_ptr,  # (R, E) float32, if WEIGHTED
    error_ptr,  # (programs along E, K, S) float32, written
    count,
    elements,
    table_row,
    table_column,
    candidates,
    chunks,
    period,
    norm,
    HAS_ZERO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARED: tl.constexpr,
    WHOLE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Errors of every candidate for ROWS rows, over `chunks` runs of COLUMNS elements; WHOLE: that is one run."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    valid = rows < count
    numbers = tl.arange(0, CANDIDATES)
    sums = tl.zeros((ROWS, CANDIDATES), tl.float32)
    # Offsets beyond one tile in 64 bits: tables have more elements than an int32 counts.
    table_rows = table_ptr + rows.to(tl.int64)[:, None] * table_row
    importance_rows = importance_ptr + (rows % period).to(tl.int64)[:, None] * elements
    error_rows = error_ptr + part * candidates * count + rows
    for chunk in range(chunks):
        columns = (part * chunks + chunk) * COLUMNS + tl.arange(0, COLUMNS)
        mask = valid[:, None] & (columns < elements)[None, :]
        values = tl.load(table_rows + columns[None, :] * table_column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            weights = tl.load(importance_rows + columns[None, :], mask=mask, other=0.0)
        scale_rows = scale_ptr + rows
        zero_rows = zero_ptr + rows
        for k in range(candidates):
            scale = tl.load(scale_rows, mask=valid, other=1.0)
            # A product with the inverse can differ from a quotient only where two codes are equally near.
            codes = values * tl.div_rn(1.0, scale)[:, None]
            if HAS_ZERO:
                zero = tl.load(zero_rows, mask=valid, other=0.0)[:, None]
                codes = _nearest(codes + zero, LOW, HIGH, FRACTION_BITS, SMALLEST) - zero
            else:
                codes = _nearest(codes, LOW, HIGH, FRACTION_BITS, SMALLEST)
            missed = codes * scale[:, None] - values
            missed = missed * missed if SQUARED else tl.exp2(norm * tl.log2(tl.abs(missed)))
            if WEIGHTED:
                missed = missed * weights
            total = tl.sum(missed, axis=1)
            if WHOLE:
                tl.store(error_rows, total, mask=valid)
                error_rows += count
            else:
                sums += tl.where((numbers == k)[None, :], total[:, None], 0.0)
            scale_rows += count
            zero_rows += count
    if not WHOLE:
        cells = error_rows[:, None] + numbers.to(tl.int64)[None, :] * count
        tl.store(cells, sums, mask=valid[:, None] & (numbers < candidates)[None, :])


@triton.jit
def fake_quantize(
    value_ptr,  # (count,) bfloat16, float16 or float32
    scale_ptr,  # (1,) of the same dtype
    zero_ptr,  # (1,) int8, if HAS_ZERO
    quantized_ptr,  # (count,) of the same dtype, written
    count,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize and dequantize BLOCK values, rounded to their own dtype wherever torch would store them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(value_ptr + at, mask=inside, other=0.0)
    dtype = values.dtype
    scale = tl.load(scale_ptr).to(tl.float32)
    codes = tl.div_rn(values.to(tl.float32), scale).to(dtype).to(tl.float32)
    if HAS_ZERO:
        zero = tl.load(zero_ptr).to(tl.float32)
        codes = (codes + zero).to(dtype).to(tl.float32)
    nearest = _nearest(codes, LOW, HIGH, FRACTION_BITS, SMALLEST)
    # What is rounded to zero keeps its sign in torch.
    sign = codes.to(tl.int32, bitcast=True) & -2147483648
    nearest = (nearest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    if HAS_ZERO:
        nearest -= zero  # at most 9 bits, with a sign: every dtype holds it
    tl.store(quantized_ptr + at, (nearest * scale).to(dtype), mask=inside)


@triton.jit
def probe(value_ptr):
    """Write 1: whether kernels can be built and run at all."""
    tl.store(value_ptr, 1.0)
