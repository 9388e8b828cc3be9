"""Factors that move between the output channels of a source and the weights that read them.

Dividing channel c of a source by s_c and multiplying the weights that read it by s_c leaves the product as it was.

Axes: C channels of the source, I input channels of a reader, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# As large as factors may get, and their inverse as small: the products stay far from the limits of float16.
_LARGEST = 1e4


def smoothquant_scales(activation_C: Tensor, weight_C: Tensor, strength: float) -> Tensor:
    """s_c = max|X_c|^strength / max|W_c|^(1 - strength), by which activations are divided; (C,) float32.

    Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models",
    equation 4. `activation_C` and `weight_C` (C,) are the largest magnitudes. A channel that was zero in all the data,
    or that no weight reads, keeps its scale.
    """
    activation_C, weight_C = activation_C.float(), weight_C.float()
    alive = (activation_C > 0) & (weight_C > 0)
    scale_C = activation_C.clamp(min=1e-30) ** strength / weight_C.clamp(min=1e-30) ** (1 - strength)
    return torch.where(alive, scale_C, 1.0).clamp_(1 / _LARGEST, _LARGEST)


def largest_by_channel(values_I: Tensor, index_I: Tensor, channels: int) -> Tensor:
    """(channels,): the largest of `values_I` >= 0 whose `index_I` is c; 0 where there is none. Index -1 is left out."""
    kept = index_I >= 0
    largest = values_I.new_zeros(channels)
    return largest.scatter_reduce_(0, index_I[kept], values_I[kept], "amax")


def sum_by_channel(values_I: Tensor, index_I: Tensor, channels: int) -> Tensor:
    """(channels,): the sum of `values_I` whose `index_I` is c. Index -1 is left out."""
    kept = index_I >= 0
    return values_I.new_zeros(channels).index_add_(0, index_I[kept], values_I[kept])


def factors_of_reader(scale_C: Tensor, index_I: Tensor) -> Tensor:
    """The factor of each input channel of a reader, (I,): that of its channel of the source, 1 where it has none."""
    return torch.where(index_I >= 0, scale_C[index_I.clamp(min=0)], 1.0)


def largest_along(weight: Tensor, axis: int) -> Tensor:
    """Largest magnitude at each position of `axis`, float32."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    low, high = weight.amin(others), weight.amax(others)
    return torch.maximum(-low, high).float()


@torch.no_grad()
def multiply_(weight: Tensor, factor: Tensor, axis: int) -> None:
    """Multiply `weight`, any floating dtype, by `factor` along `axis` in place: in float32, rounded once."""
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    weight.copy_(weight.float() * factor.float().reshape(shape))


@torch.no_grad()
def divide_gain_(gain: Tensor, scale_C: Tensor, offset: float) -> None:
    """Divide `offset + gain` by `scale_C` along the first axis in place: in float32, rounded once.

    `offset` is 1 for norms that multiply by 1 plus their weight.
    """
    shape = (-1,) + (1,) * (gain.dim() - 1)
    gain.copy_((gain.float() + offset) / scale_C.float().reshape(shape) - offset)


def keep(scale_C: Tensor, kept: Sequence[int]) -> Tensor:
    """`scale_C` with 1 at the channels `kept`."""
    return scale_C.index_fill(0, torch.tensor(kept, dtype=torch.int64, device=scale_C.device), 1.0) if kept else scale_C
