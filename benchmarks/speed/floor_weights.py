"""The least work on weights: what GPTQ's solves cannot leave out, and plain rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.speed.floor_inputs import Distinct

BLOCK = 128
DAMPING = 0.01


class Solves:
    """GPTQ's solves of all layers without the loop over columns; weights that share their input are solved together.

    Each part runs once at construction, so that a library is initialized before it is measured.

    Args:
        distinct: the inputs and weights of one layer.
        layers: how many such layers there are.
        device: where to compute.
    """

    def __init__(self, distinct: Sequence[Distinct], layers: int, device: torch.device) -> None:
        self._layers = layers
        self._hessians = [_damped(each.rows).flip(0, 1) for each in distinct]
        self.uppers = [torch.linalg.cholesky(h).flip(0, 1) for h in self._hessians]
        self.weights = [each.weight.float() for each in distinct]
        self.errors = [torch.randn(len(w), BLOCK, device=device) * 1e-3 for w in self.weights]
        for each in zip(self.weights, self.errors, self.uppers, strict=True):
            _update(*each)

    def factorise(self) -> None:
        """Cholesky factors of the flipped, damped Hessians."""
        for _ in range(self._layers):
            for h in self._hessians:
                torch.linalg.cholesky_ex(h)

    def update(self) -> None:
        """What the errors of each block of columns change in all columns after it."""
        for _ in range(self._layers):
            for each in zip(self.weights, self.errors, self.uppers, strict=True):
                _update(*each)


def round_to_nearest(weight: Tensor, group_size: int | None) -> Tensor:
    """`weight` (O, I) on symmetric 4-bit grids, one for each group of columns, as its dtype computes it."""
    grouped = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    scale = grouped.abs().amax(-1, keepdim=True).clamp_(min=1e-8) / 7.5
    return (grouped / scale).round_().clamp_(-8, 7).mul_(scale).flatten(1)


def _update(weight: Tensor, error: Tensor, upper: Tensor) -> None:
    width = weight.shape[1]
    for end in range(BLOCK, width, BLOCK):
        weight[:, end:].addmm_(error, upper[end - BLOCK : end, end:], alpha=-1)


def _damped(rows: Tensor) -> Tensor:
    rows = rows.float()
    h = rows.t() @ rows
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return h
