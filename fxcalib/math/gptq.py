"""GPTQ: quantize a weight column by column, each column making up for the errors of those before it.

Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers", algorithm 1.

With the Hessian factored as H = R R^T, R upper triangular, the value that column j should take once the columns P
before it are fixed is

    w'_j = w_j + (W - Q)_P R_Pj / R_jj,

and the objective tr((W - Q) H (W - Q)^T) is the sum over j of R_jj^2 ||w'_j - q_j||^2. The paper states the same
update with the Cholesky factor of H^-1, which is R^-1; in this form no inverse is needed. R comes from one ordinary
Cholesky factorisation of H with both axes flipped, so this module keeps its columns in flipped order and walks from
the last one to the first: with L = R flipped, P are the columns after j.

Axes: O output channels, I input channels, G scales of one output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcalib.math.grids import Grid
from fxcalib.math.qparams import QParams

Order = Literal["given", "activation"]

# A Hessian that cannot be factored is damped ten times more, up to adding its whole mean diagonal.
_DAMPING_STEP = 10.0
_DAMPING_LIMIT = 1.0


@dataclass(frozen=True)
class Factor:
    """A factored Hessian, ready to solve any number of weights."""

    lower_II: Tensor
    """L with its columns divided by their diagonal element, float32, both axes in flipped processing order."""
    diagonal_I: Tensor
    """Diagonal of L, in the same order."""
    order_I: Tensor
    """Input channel at each flipped position, int64."""
    damping_I: Tensor
    """What was added to the diagonal of H, in the same order."""
    notes: tuple[str, ...]
    """What went another way than asked."""

    def importance(self) -> Tensor:
        """(I,) in input channel order: R_jj^2, the variance of channel j that the channels after it cannot explain.

        It is what an error of column j costs once the later columns have made up for it as well as they can.
        """
        importance = torch.empty_like(self.diagonal_I)
        importance[self.order_I] = self.diagonal_I.square()
        return importance


@dataclass(frozen=True)
class Solution:
    """A quantized weight."""

    weight_OI: Tensor
    """Quantized and dequantized, float32."""
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    error_O: Tensor
    """(W - Q) H (W - Q)^T of each output channel, float32."""
    energy_O: Tensor
    """W H W^T of each output channel, float32."""


class Unfactorable(ArithmeticError):
    """A Hessian that is not finite, or not positive definite even with the most damping."""


def factorize(hessian_II: Tensor, dampening_frac: float = 0.01, order: Order = "activation") -> Factor:
    """Factor a Hessian (I, I) float32, any scale, adding `dampening_frac` of its mean diagonal to the diagonal.

    `order`: columns are quantized as given, or by falling diagonal (the paper's repository calls it act-order), so
    that the channels that matter most meet the fewest errors to make up for. A channel that was zero in all the data
    gets the mean diagonal: nothing couples it to others, and it is rounded to nearest. If the factorisation fails,
    ten times the damping is tried, up to the whole mean diagonal.

    Raises:
        Unfactorable: not finite, or not positive definite with the most damping.
    """
    diagonal = hessian_II.diagonal()
    if not bool(torch.isfinite(diagonal.sum())):
        raise Unfactorable("the Hessian holds NaN or infinity")
    positions = torch.arange(len(diagonal), device=hessian_II.device)
    processing = positions if order == "given" else torch.argsort(diagonal, descending=True, stable=True)
    flipped = processing.flip(0)
    dead = diagonal[flipped] <= 0
    mean = float(diagonal.mean())
    if mean <= 0:
        raise Unfactorable("the Hessian is zero: every input of the calibration data was")
    fraction = dampening_frac
    notes: tuple[str, ...] = ()
    while True:
        damped = hessian_II[flipped][:, flipped]
        damping = (fraction + dead.float()) * mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed) and bool(torch.isfinite(lower.diagonal().sum())):
            break
        if fraction >= _DAMPING_LIMIT:
            raise Unfactorable(f"the Hessian is not positive definite even with damping {fraction:g}")
        fraction = min(max(fraction * _DAMPING_STEP, 1e-3), _DAMPING_LIMIT)
        notes = (f"damping raised from {dampening_frac:g} to {fraction:g}: the Hessian was singular",)
    factor_diagonal = lower.diagonal().clone()
    lower.div_(factor_diagonal)
    return Factor(lower, factor_diagonal, flipped, damping, notes)


def solve(
    weight_OI: Tensor,
    factor: Factor,
    grid: Grid,
    group_of_column: list[int],
    qparams: QParams | Callable[[Tensor, int], QParams],
    *,
    block_size: int = 128,
) -> Solution:
    """Quantize `weight_OI` (O, I), any floating dtype, for least output error given its inputs' factored Hessian.

    `group_of_column` says for each input channel which scale it has. `qparams` holds scale and zero point as (O, G)
    float32, or finds them: it is then called with each group's columns (O, columns) float32, as updated for the errors
    so far, and the group's number when the first of them is reached, and returns (O,) each; this needs a `Factor` in
    the given column order.
    Weights that share their inputs are solved together by stacking them along O.

    Columns are handled `block_size` at a time: what earlier blocks contribute is one matrix product a block.
    """
    out, width = weight_OI.shape
    lower, diagonal = factor.lower_II, factor.diagonal_I
    order = factor.order_I.tolist()
    # Columns as rows, so that one column of all output channels is contiguous.
    w_IO = weight_OI.t()[factor.order_I].float()
    energy_O = _quadratic_form(w_IO, factor)
    quantized_IO = torch.empty_like(w_IO)
    error_IO = torch.empty_like(w_IO)
    loss_O = torch.zeros(out, device=w_IO.device)
    groups = [group_of_column[column] for column in order]
    search = qparams if callable(qparams) else None
    scales, zeros = _by_group(qparams, max(group_of_column) + 1, out, w_IO.device)
    code = torch.empty(out, device=w_IO.device)
    found = -1
    for end in range(width, 0, -block_size):
        start = max(end - block_size, 0)
        block_O = torch.addmm(w_IO[start:end], lower[end:, start:end].t(), error_IO[end:])
        targets, originals = block_O.unbind(0), w_IO[start:end].unbind(0)
        quantized, errors = quantized_IO[start:end].unbind(0), error_IO[start:end].unbind(0)
        errors_OB, lower_BB = error_IO[start:end].t(), lower[start:end, start:end].unbind(1)
        for at in range(end - start - 1, -1, -1):
            group = groups[start + at]
            if search is not None and group != found:
                _search_group(search, group, start + at, groups, w_IO, error_IO, lower, scales, zeros)
                found = group
            target = targets[at].addmv_(errors_OB[:, at + 1 :], lower_BB[at][at + 1 :])
            zero = zeros[group]
            torch.div(target, scales[group], out=code)
            if zero is None:
                torch.mul(grid.round_(code), scales[group], out=quantized[at])
            else:
                torch.mul(grid.round_(code.add_(zero)).sub_(zero), scales[group], out=quantized[at])
            torch.sub(originals[at], quantized[at], out=errors[at])
        missed = block_O.sub_(quantized_IO[start:end]).mul_(diagonal[start:end, None])
        loss_O += missed.square_().sum(0)
    loss_O -= factor.damping_I @ error_IO.square_()
    # The weight's own array takes the result: three arrays of its size are all that a solve holds.
    solved = w_IO.index_copy_(0, factor.order_I, quantized_IO)
    zero_OG = None if zeros[0] is None else torch.stack([z for z in zeros if z is not None], 1)
    return Solution(solved.t(), torch.stack(scales, 1), zero_OG, loss_O.clamp_(min=0.0), energy_O)


def _by_group(
    qparams: QParams | Callable[[Tensor, int], QParams], groups: int, out: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Contiguous (O,) scales and zero points, one pair for each group; placeholders where they are to be found."""
    if callable(qparams):
        return [torch.empty(0, device=device)] * groups, [None] * groups
    scales = [column.expand(out).contiguous() for column in qparams.scale.float().unbind(1)]
    if qparams.zero_point is None:
        return scales, [None] * groups
    return scales, [column.expand(out).contiguous() for column in qparams.zero_point.float().unbind(1)]


def _search_group(
    search: Callable[[Tensor, int], QParams],
    group: int,
    last: int,
    groups: list[int],
    w_IO: Tensor,
    error_IO: Tensor,
    lower: Tensor,
    scales: list[Tensor],
    zeros: list[Tensor | None],
) -> None:
    """Fill scale and zero point of `group`, whose columns end at flipped position `last`, from its updated columns.

    The update that standard GPTQ has applied to a whole group when its first column is reached is
    (W - Q)_P R_PG R_GG^-1: a triangular solve of the group's size.
    """
    first = last
    while first > 0 and groups[first - 1] == group:
        first -= 1
    after = lower[last + 1 :, first : last + 1].t() @ error_IO[last + 1 :]
    own = lower[first : last + 1, first : last + 1].t()
    update = torch.linalg.solve_triangular(own, after, upper=True, unitriangular=True)
    scale, zero_point = search((w_IO[first : last + 1] + update).flip(0).t(), group)
    scales[group], zeros[group] = scale.contiguous(), None if zero_point is None else zero_point.contiguous()


def _quadratic_form(w_IO: Tensor, factor: Factor) -> Tensor:
    """W H W^T of each output channel, without the damping."""
    mixed = torch.mm(factor.lower_II.t(), w_IO).square_()
    energy = factor.diagonal_I.square() @ mixed
    return (energy - factor.damping_I @ torch.square(w_IO, out=mixed)).clamp_(min=0.0)
