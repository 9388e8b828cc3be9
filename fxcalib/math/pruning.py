"""Which weights to prune: masks by magnitude and by Wanda's score, N:M patterns, and sparsities of layers by OWL.

A mask is true where a weight is pruned. Of equal scores the one with the lower index goes first, on every device.

Axes: O output channels, I input channels, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: `kept` of every `run` consecutive weights of a row may be other than zero.

    Mishra et al. 2021, "Accelerating sparse deep neural networks". `run` divides the length of a row.
    """

    kept: int
    run: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.run}"

    @property
    def sparsity(self) -> float:
        """The part of the weights that is pruned."""
        return 1 - self.kept / self.run

    def mask(self, scores_OI: Tensor) -> Tensor:
        """The mask that keeps the highest scores of every run."""
        return prune_lowest_in_rows(self._runs(scores_OI), self.run - self.kept).reshape(scores_OI.shape)

    def fits(self, weight_OI: Tensor) -> Tensor:
        """Whether a weight has this pattern; 0-dim bool."""
        return (self._runs(weight_OI).count_nonzero(-1) <= self.kept).all()

    def _runs(self, values_OI: Tensor) -> Tensor:
        return values_OI.reshape(len(values_OI), -1, self.run)


class SquareSums:
    """The running sum of squares of each input channel, the diagonal of X^T X, in float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(width, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., I), any floating dtype, on the device of the sum."""
        x_NI = inputs.reshape(-1, inputs.shape[-1])
        self.sum_I += torch.linalg.vector_norm(x_NI, dim=0, dtype=torch.float32).square_()

    def clone(self) -> SquareSums:
        """A sum of its own with the same contents."""
        copy = object.__new__(SquareSums)
        copy.sum_I = self.sum_I.clone()
        return copy


def prune_lowest(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` lowest of all scores, which are not NaN; bool of their shape.

    Scores need no sorting for it, and ties at the threshold, of which bfloat16 magnitudes have many, are counted.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = torch.kthvalue(flat, count).values
    mask = flat < threshold
    tied = (flat == threshold).nonzero()[:, 0]
    mask[tied[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def prune_lowest_in_rows(scores_OI: Tensor, count: int) -> Tensor:
    """The mask of the `count` lowest scores of each row."""
    order_OI = torch.argsort(scores_OI, dim=-1, stable=True)
    return torch.zeros_like(scores_OI, dtype=torch.bool).scatter_(-1, order_OI[..., :count], True)


def wanda_scores(weight_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2, (O, I) float32.

    Sun et al. 2023, "A simple and effective pruning approach for large language models", equation 1. `square_sum_I`
    holds the squared norms ||X_j||^2 of the input channels.
    """
    return weight_OI.float().abs() * square_sum_I.float().sqrt()


def outlier_ratio(scores: Sequence[Tensor], multiple: float) -> Tensor:
    """The part of a layer's scores that is above `multiple` times their mean, 0-dim float32.

    Yin et al. 2023, "Outlier weighed layerwise sparsity (OWL)", equation 1, on Wanda's scores of all the weights of one
    layer.
    """
    count = sum(each.numel() for each in scores)
    threshold = multiple * torch.stack([each.sum(dtype=torch.float64) for each in scores]).sum() / count
    return torch.stack([(each > threshold).sum() for each in scores]).sum().float() / count


def layer_sparsities(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, deviation: float
) -> tuple[float, ...]:
    """The sparsity of each layer by OWL: the higher its outlier ratio, the less of it is pruned.

    Yin et al. 2023, section 3.2: proportional to 1 - ratio, within `deviation` of `sparsity` either way,
    and `sparsity` on average over all weights, of which layer k has `sizes[k]`. So the layer that is farthest from the
    average ratio gets the whole deviation. All layers get `sparsity` where all ratios are equal.
    """
    mean = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    farthest = max(abs(ratio - mean) for ratio in ratios)
    slope = 0.0 if farthest < 1e-9 else deviation / farthest
    return tuple(sparsity - slope * (ratio - mean) for ratio in ratios)
