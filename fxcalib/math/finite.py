"""Whether a tensor holds NaN or infinity, in one pass and without a temporary of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def finite(tensor: Tensor) -> Tensor:
    """Whether every value of a floating-point `tensor` of any shape is finite, as a 0-dim bool tensor on its device.

    NaN and infinity both reach the extremes, so those two numbers tell.
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(tensor)
    return torch.isfinite(low) & torch.isfinite(high)


def all_finite(tensor: Tensor) -> bool:
    """`finite` as a truth; waits for the device."""
    return bool(finite(tensor))
