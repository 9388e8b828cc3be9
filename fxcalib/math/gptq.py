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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from fxcalib.math import kernels
from fxcalib.math.grids import Grid
from fxcalib.math.hessian import strips
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
    positions = torch.arange(len(diagonal), device=hessian_II.device)
    processing = positions if order == "given" else torch.argsort(diagonal, descending=True, stable=True)
    flipped = processing.flip(0)
    dead = diagonal[flipped] <= 0
    trace, mean = diagonal.sum(), diagonal.mean()
    fraction = dampening_frac
    notes: tuple[str, ...] = ()
    while True:
        damping = (fraction + dead.float()) * mean
        lower, failed = _cholesky(hessian_II, flipped, damping)
        # Everything that decides what comes next in one wait for the device.
        total, average, factored, failure = torch.stack([trace, mean, lower.diagonal().sum(), failed.float()]).tolist()
        if not math.isfinite(total):
            raise Unfactorable("the Hessian holds NaN or infinity")
        if average <= 0:
            raise Unfactorable("the Hessian is zero: every input of the calibration data was")
        if not failure and math.isfinite(factored):
            break
        if fraction >= _DAMPING_LIMIT:
            raise Unfactorable(f"the Hessian is not positive definite even with damping {fraction:g}")
        del lower
        fraction = min(max(fraction * _DAMPING_STEP, 1e-3), _DAMPING_LIMIT)
        notes = (f"damping raised from {dampening_frac:g} to {fraction:g}: the Hessian was singular",)
    factor_diagonal = lower.diagonal().clone()
    lower.div_(factor_diagonal)
    return Factor(lower, factor_diagonal, flipped, damping, notes)


def corrected(weight_OI: Tensor, factor: Factor, shift_II: Tensor, strength: float = 1.0) -> Tensor:
    """A weight (O, I) float32 whose outputs on its inputs X are near to those of `weight_OI` on inputs Y.

    `shift_II` is (Y - X)^T X. W + W (Y - X)^T X H^-1, with the damped Hessian of `factor`, is nearest: the squared
    distance of any Q to the outputs on Y, ||X Q^T - Y W^T||^2, is that of Q to this weight under H plus a number that
    Q does not change, so that quantizing it as usual is quantizing for the original outputs (the asymmetric objective
    of Li et al. 2025, "GPTAQ", and Zhang et al. 2025, "Qronos"). Only `strength` of the way is gone.
    """
    # first the columns of the shift: its product with the weight, then one solve with the factor
    moved_IO = (weight_OI.float() @ shift_II).t()[factor.order_I]
    lower_II = factor.lower_II * factor.diagonal_I
    update_IO = torch.cholesky_solve(moved_IO, lower_II)
    result_IO = torch.empty_like(update_IO).index_copy_(0, factor.order_I, update_IO)
    return torch.add(weight_OI.float(), result_IO.t(), alpha=strength)


def solve(
    weight_OI: Tensor,
    factor: Factor,
    grid: Grid,
    group_of_column: list[int],
    qparams: QParams | Callable[[Tensor, int], QParams],
    *,
    block_size: int = 128,
    pruned_OI: Tensor | None = None,
) -> Solution:
    """Quantize `weight_OI` (O, I), any floating dtype, for least output error given its inputs' factored Hessian.

    `group_of_column` says for each input channel which scale it has. `qparams` holds scale and zero point as (O, G)
    float32, or finds them: it is then called with each group's columns (O, columns) float32, as updated for the errors
    so far, and the group's number when the first of them is reached, and returns (O,) each; this needs a `Factor` in
    the given column order.
    Weights that share their inputs are solved together by stacking them along O.

    Columns are handled `block_size` at a time: what earlier blocks contribute is one matrix product a block.
    `pruned_OI`: bool, true where a weight becomes zero, for the others to make up for.
    """
    # Columns as rows, so that one column of all output channels is contiguous.
    w_IO = weight_OI.t()[factor.order_I].float()
    energy_O = quadratic_form(w_IO, factor)
    pruned_IO = None if pruned_OI is None else pruned_OI.t()[factor.order_I]
    walk = _Walk(w_IO, factor, grid, group_of_column, qparams, pruned_IO)
    fused = kernels.available(w_IO)
    if fused:
        block_size = min(block_size, kernels.BLOCK_LIMIT)
    for end in range(len(w_IO), 0, -block_size):
        block = slice(max(end - block_size, 0), end)
        targets_BO = torch.addmm(w_IO[block], factor.lower_II[end:, block].t(), walk.error_IO[end:])
        if fused:
            walk.fused(block, targets_BO)
        else:
            walk.columns(block, targets_BO)
            missed = targets_BO.sub_(walk.quantized_IO[block]).mul_(factor.diagonal_I[block, None])
            walk.loss_O += missed.square_().sum(0)
    loss_O = walk.loss_O
    loss_O -= factor.damping_I @ walk.error_IO.square_()
    # The weight's own array takes the result: three arrays of its size are all that a solve holds.
    solved = w_IO.index_copy_(0, factor.order_I, walk.quantized_IO)
    zero_OG = None if walk.zeros_GO is None else walk.zeros_GO.t().contiguous()
    return Solution(solved.t(), walk.scales_GO.t().contiguous(), zero_OG, loss_O.clamp_(min=0.0), energy_O)


class _Walk:
    """A solve under way, from the last column in flipped order to the first."""

    def __init__(
        self,
        w_IO: Tensor,
        factor: Factor,
        grid: Grid,
        group_of_column: list[int],
        qparams: QParams | Callable[[Tensor, int], QParams],
        pruned_IO: Tensor | None,
    ) -> None:
        self._w_IO, self._factor, self._grid, self._group_of_column = w_IO, factor, grid, group_of_column
        self._pruned_IO = pruned_IO
        self.quantized_IO, self.error_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
        out = w_IO.shape[1]
        self.loss_O = torch.zeros(out, device=w_IO.device)
        self.zeros_GO: Tensor | None = None
        self._search = qparams if callable(qparams) else None
        self._found = -1
        if callable(qparams):
            self.scales_GO = torch.empty(max(group_of_column) + 1, out, device=w_IO.device)
            return
        self.scales_GO = qparams.scale.float().expand(out, -1).t().contiguous()
        if qparams.zero_point is not None:
            self.zeros_GO = qparams.zero_point.float().expand(out, -1).t().contiguous()

    @cached_property
    def _groups(self) -> list[int]:
        """The group of each flipped position. Waits for the device, but not in the given order."""
        if self._search is not None:
            return self._group_of_column[::-1]
        return [self._group_of_column[column] for column in self._factor.order_I.tolist()]

    @cached_property
    def _groups_I(self) -> Tensor:
        """`_groups` on the device, int32, without a wait."""
        cuda = self._w_IO.is_cuda
        groups_I = torch.tensor(self._group_of_column, dtype=torch.int32, pin_memory=cuda)
        return groups_I.to(self._w_IO.device, non_blocking=True)[self._factor.order_I]

    def columns(self, block: slice, targets_BO: Tensor) -> None:
        """Quantize the columns of a block; `targets_BO` is what those after it ask for, and gets the block's share."""
        start, groups, grid = block.start, self._groups, self._grid
        targets, originals = targets_BO.unbind(0), self._w_IO[block].unbind(0)
        quantized, errors = self.quantized_IO[block].unbind(0), self.error_IO[block].unbind(0)
        errors_OB, lower_BB = self.error_IO[block].t(), self._factor.lower_II[block, block].unbind(1)
        code = torch.empty_like(self.loss_O)
        for at in range(len(targets) - 1, -1, -1):
            group = groups[start + at]
            self._reach(group, start + at)
            target = targets[at].addmv_(errors_OB[:, at + 1 :], lower_BB[at][at + 1 :])
            scale, zero = self.scales_GO[group], None if self.zeros_GO is None else self.zeros_GO[group]
            torch.div(target, scale, out=code)
            if zero is None:
                torch.mul(grid.round_(code), scale, out=quantized[at])
            else:
                torch.mul(grid.round_(code.add_(zero)).sub_(zero), scale, out=quantized[at])
            if self._pruned_IO is not None:
                quantized[at].masked_fill_(self._pruned_IO[start + at], 0.0)
            torch.sub(originals[at], quantized[at], out=errors[at])

    def fused(self, block: slice, targets_BO: Tensor) -> None:
        """As `columns` by a kernel, one launch for the columns between two searches; adds the loss of the block too."""
        start, width = block.start, len(targets_BO)
        runs = [range(width)]
        if self._search is not None:
            positions = groupby(range(width), lambda at: self._groups[start + at])
            runs = [range(at[0], at[-1] + 1) for at in (list(run) for _, run in positions)]
        for columns in reversed(runs):
            if self._search is not None:
                last = start + columns[-1]
                self._reach(self._groups[last], last)
            kernels.solve_columns(
                targets_BO,
                self._w_IO[block],
                self.quantized_IO[block],
                self.error_IO[block],
                self._factor.lower_II[block, block],
                self._factor.diagonal_I[block],
                self._groups_I[block],
                columns,
                self.scales_GO,
                self.zeros_GO,
                self._grid,
                self.loss_O,
                None if self._pruned_IO is None else self._pruned_IO[block],
            )

    def _reach(self, group: int, last: int) -> None:
        """Find scale and zero point of `group`, whose columns end at flipped position `last`, from its updated columns.

        The update that standard GPTQ has applied to a whole group when its first column is reached is
        (W - Q)_P R_PG R_GG^-1: a triangular solve of the group's size.
        """
        if self._search is None or group == self._found:
            return
        self._found, lower, error_IO = group, self._factor.lower_II, self.error_IO
        first = last
        while first > 0 and self._groups[first - 1] == group:
            first -= 1
        own, later = slice(first, last + 1), slice(last + 1, None)
        after = lower[later, own].t() @ error_IO[later]
        update = torch.linalg.solve_triangular(lower[own, own].t(), after, upper=True, unitriangular=True)
        updated = self._w_IO[own] + update
        if self._pruned_IO is not None:
            updated.masked_fill_(self._pruned_IO[own], 0.0)
        scale, zero_point = self._search(updated.flip(0).t(), group)
        self.scales_GO[group] = scale
        if zero_point is not None:
            if self.zeros_GO is None:
                self.zeros_GO = torch.empty_like(self.scales_GO)
            self.zeros_GO[group] = zero_point


def _cholesky(hessian_II: Tensor, flipped: Tensor, damping_I: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of the permuted and damped Hessian, and whether there is none, without a wait for the device."""
    damped = torch.empty_like(hessian_II)
    for rows in strips(len(damped), damped.device):  # indexing both axes at once would make indices of twice its size
        torch.index_select(hessian_II[flipped[rows]], 1, flipped, out=damped[rows])
    damped.diagonal().add_(damping_I)
    # Column-major, as the factor is: the factorisation replaces the one copy that is made.
    damped = damped.t()
    info = torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(damped, out=(damped, info))
    return damped, info


def quadratic_form(w_IO: Tensor, factor: Factor) -> Tensor:
    """W H W^T of each output channel, without the damping."""
    energy = w_IO.new_zeros(w_IO.shape[1])
    # Strips leave out most of the half of L that is zero, and need no second array of the weight's size.
    for columns in strips(len(w_IO), w_IO.device) if w_IO.is_cuda else [slice(0, len(w_IO))]:
        mixed = torch.mm(factor.lower_II[columns.start :, columns].t(), w_IO[columns.start :]).square_()
        energy += factor.diagonal_I[columns].square() @ mixed
        energy -= factor.damping_I[columns] @ torch.square(w_IO[columns], out=mixed)
    return energy.clamp_(min=0.0)
