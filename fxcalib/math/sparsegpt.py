"""SparseGPT: prune a weight column by column, the columns that are left making up for what is gone.

Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one-shot", algorithm 1.

It is GPTQ with a grid that holds zero where the mask prunes and every number where it does not, so the notation is that
of `fxcalib.math.gptq`: H = R R^T, columns in flipped order with L = R flipped, and w'_j = w_j + (W - Q)_P R_Pj / R_jj
is what column j should be once the columns P before it are fixed. The paper prunes the lowest w^2 / [H^-1]_jj^2 of its
Cholesky factor of H^-1, which is R^-1: that is (w R_jj)^2.

Axes: O output channels, I input channels, B columns of a block, C columns that one mask is selected for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcalib.math.gptq import Factor, quadratic_form
from fxcalib.math.pruning import Pattern, prune_lowest


@dataclass(frozen=True)
class Pruned:
    """A pruned weight."""

    weight_OI: Tensor
    """float32, exactly zero where it is pruned."""
    error_O: Tensor
    """(W - Q) H (W - Q)^T of each output channel, float32."""
    energy_O: Tensor
    """W H W^T of each output channel, float32."""


def solve(
    weight_OI: Tensor,
    factor: Factor,
    sparsity: float | Pattern,
    *,
    parts: Sequence[int] | None = None,
    block_size: int = 128,
    keep_zeros: bool = False,
) -> Pruned:
    """Prune `weight_OI` (O, I), any floating dtype, for least output error given its inputs' factored Hessian.

    Args:
        factor: of the Hessian in the given column order.
        sparsity: the part of the weights to prune, or an N:M pattern whose run divides I.
        parts: numbers of consecutive rows, of O in all, that are pruned to `sparsity` each: weights that share their
            inputs are solved together by stacking them along O. None: all rows are one weight.
        block_size: columns that the paper's mask is selected for at once: a `sparsity` is met within each block of each
            part. It changes nothing but speed for a pattern, whose masks are selected run by run.
        keep_zeros: weights that are zero already stay so and count as pruned.
    """
    pattern = sparsity if isinstance(sparsity, Pattern) else None
    if pattern is not None:
        block_size = -(-block_size // pattern.run) * pattern.run
    rows = [len(weight_OI)] if parts is None else list(parts)
    # Columns as rows, so that one column of all output channels is contiguous.
    w_IO = weight_OI.t()[factor.order_I].float()
    energy_O = quadratic_form(w_IO, factor)
    pruned_IO, error_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
    loss_O = torch.zeros_like(energy_O)
    for end in range(len(w_IO), 0, -block_size):
        block = slice(max(end - block_size, 0), end)
        targets_BO = torch.addmm(w_IO[block], factor.lower_II[end:, block].t(), error_IO[end:])
        run = block.stop - block.start if pattern is None else pattern.run
        for stop in range(end, block.start, -run):
            own = slice(stop - run, stop)
            targets_CO = targets_BO[own.start - block.start : own.stop - block.start]
            targets_CO.addmm_(factor.lower_II[stop:end, own].t(), error_IO[stop:end])
            scores_CO = _update(w_IO[own], targets_CO, factor.lower_II[own, own]) * factor.diagonal_I[own, None]
            scores_CO.square_()
            if keep_zeros:
                scores_CO.masked_fill_(w_IO[own] == 0, -1.0)
            mask_CO = _select(scores_CO, sparsity, rows)
            if keep_zeros:
                mask_CO |= w_IO[own] == 0
            _columns(w_IO[own], targets_CO, mask_CO, factor.lower_II[own, own], pruned_IO[own], error_IO[own])
        missed_BO = targets_BO.sub_(pruned_IO[block]).mul_(factor.diagonal_I[block, None])
        loss_O += missed_BO.square_().sum(0)
    loss_O -= factor.damping_I @ error_IO.square_()
    # The weight's own array takes the result: three arrays of its size are all that a solve holds.
    solved_IO = w_IO.index_copy_(0, factor.order_I, pruned_IO)
    return Pruned(solved_IO.t(), loss_O.clamp_(min=0.0), energy_O)


def _update(w_CO: Tensor, targets_CO: Tensor, lower_CC: Tensor) -> Tensor:
    """The columns as all those before them have updated them, together: (W - Q)_P R_PC R_CC^-1 is added."""
    change_CO: Tensor = torch.linalg.solve_triangular(lower_CC.t(), targets_CO - w_CO, upper=True, unitriangular=True)
    return change_CO.add_(w_CO)


def _select(scores_CO: Tensor, sparsity: float | Pattern, rows: Sequence[int]) -> Tensor:
    """The mask, for columns in flipped order."""
    if isinstance(sparsity, Pattern):
        return sparsity.mask(scores_CO.flip(0).t()).t().flip(0)
    masks = [prune_lowest(part, round(sparsity * part.numel())) for part in torch.split(scores_CO, list(rows), dim=1)]
    return torch.cat(masks, dim=1)


def _columns(
    w_CO: Tensor, targets_CO: Tensor, mask_CO: Tensor, lower_CC: Tensor, pruned_CO: Tensor, error_CO: Tensor
) -> None:
    """Fix the columns from the last to the first; `targets_CO` gets the share of those after each."""
    kept_CO = (~mask_CO).float()
    for at in range(len(w_CO) - 1, -1, -1):
        target_O = targets_CO[at].addmv_(error_CO[at + 1 :].t(), lower_CC[at + 1 :, at])
        torch.mul(target_O, kept_CO[at], out=pruned_CO[at])
        torch.sub(w_CO[at], pruned_CO[at], out=error_CO[at])
