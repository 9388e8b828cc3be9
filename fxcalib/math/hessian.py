"""Second moments of a layer's inputs, X^T X, accumulated in float32.

Axes: N tokens, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of one matrix product where the input must be converted to float32 first: bounds the copy.
_TOKENS = 8192


class Hessian:
    """The running sum H = X^T X of one layer's inputs.

    The layer-wise objective ||(W - Q) X^T||^2 has the Hessian 2 X^T X for each output channel (Frantar et al. 2023,
    section 2), often scaled to 2/N. Solving for Q, damping by a fraction of the mean diagonal, and relative errors do
    not depend on the factor, so the plain sum is kept: sums of several ranks or runs simply add.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        """(I, I) float32."""
        self.tokens = 0
        """Rows added, those that were zeroed as padding included."""

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., I), any floating dtype, on the device of the sum.

        float16 and bfloat16 on CUDA go to the tensor cores as they are with float32 accumulation: their products are
        exact in float32, so nothing but the order of summation differs from converting them first. No (I, I) temporary
        is made on the CPU.
        """
        x_NI = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += x_NI.shape[0]
        if x_NI.is_cuda and x_NI.dtype in (torch.float16, torch.bfloat16):
            self.sum_II += torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
            return
        for part_NI in torch.split(x_NI, _TOKENS):
            part_NI = part_NI.float()
            self.sum_II.addmm_(part_NI.t(), part_NI)

    def clone(self) -> Hessian:
        """A sum of its own with the same contents."""
        copy = object.__new__(Hessian)
        copy.sum_II, copy.tokens = self.sum_II.clone(), self.tokens
        return copy
