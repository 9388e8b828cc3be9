"""Second moments of a layer's inputs, X^T X, accumulated in float32.

Axes: N tokens, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of one matrix product where the input must be converted to float32 first: bounds the copy.
_TOKENS = 8192
# A matrix of which only one triangle is wanted is computed in strips: enough of them to leave out most of the other,
# and wide enough for a product to fill an accelerator.
_STRIPS = 8
_NARROWEST = {"cpu": 64}
_NARROWEST_ON_ACCELERATORS = 1024


def strips(width: int, device: torch.device) -> list[slice]:
    """Ranges that make up `width` rows, multiples of 64 long but for the last."""
    step = max(-(-width // _STRIPS), _NARROWEST.get(device.type, _NARROWEST_ON_ACCELERATORS))
    step = -(-step // 64) * 64
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


class Hessian:
    """The running sum H = X^T X of one layer's inputs.

    The layer-wise objective ||(W - Q) X^T||^2 has the Hessian 2 X^T X for each output channel (Frantar et al. 2023,
    section 2), often scaled to 2/N. Solving for Q, damping by a fraction of the mean diagonal, and relative errors do
    not depend on the factor, so the plain sum is kept: sums of several ranks or runs simply add.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        """(I, I) float32; until `full` is called, the triangle above the diagonal lacks what was added."""
        self.tokens = 0
        """Rows added, those that were zeroed as padding included."""

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., I), any floating dtype, on the device of the sum.

        float16 and bfloat16 on CUDA go to the tensor cores as they are with float32 accumulation: their products are
        exact in float32, so nothing but the order of summation differs from converting them first. No (I, I) temporary
        is made, and only the lower triangle is computed.
        """
        x_NI = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += x_NI.shape[0]
        if x_NI.is_cuda and x_NI.dtype in (torch.float16, torch.bfloat16):
            self._add_lower(x_NI)
            return
        for part_NI in torch.split(x_NI, _TOKENS):
            self._add_lower(part_NI.float())

    def full(self) -> Tensor:
        """`sum_II` with both triangles."""
        for rows in strips(len(self.sum_II), self.sum_II.device):
            self.sum_II[rows, rows.stop :] = self.sum_II[rows.stop :, rows].t()
        return self.sum_II

    def clone(self) -> Hessian:
        """A sum of its own with the same contents."""
        copy = object.__new__(Hessian)
        copy.sum_II, copy.tokens = self.sum_II.clone(), self.tokens
        return copy

    def _add_lower(self, x_NI: Tensor) -> None:
        for rows in strips(x_NI.shape[1], x_NI.device):
            sum_SC = self.sum_II[rows, : rows.stop]
            left_SN, right_NC = x_NI[:, rows].t(), x_NI[:, : rows.stop]
            if x_NI.dtype == torch.float32:
                sum_SC.addmm_(left_SN, right_NC)
            elif type(x_NI) is Tensor:
                torch.addmm(sum_SC, left_SN, right_NC, out_dtype=torch.float32, out=sum_SC)
            else:
                # Fake tensors of torch 2.11 do not know the dtype of the sum.
                sum_SC += torch.mm(left_SN, right_NC, out_dtype=torch.float32)


class InputShift:
    """The running sum D = (Y - X)^T X of the inputs X of a layer in the compressed model and Y in the original one.

    The weight whose outputs on X are nearest to those of W on Y is W + W D H^-1, with H = X^T X.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        """(I, I) float32; rows are channels of Y - X."""

    @torch.no_grad()
    def add(self, inputs: Tensor, originals: Tensor) -> None:
        """Add inputs and original inputs, both (..., I), of one floating dtype and device."""
        x_NI, y_NI = (each.reshape(-1, each.shape[-1]) for each in (inputs, originals))
        for x, y in zip(torch.split(x_NI, _TOKENS), torch.split(y_NI, _TOKENS), strict=True):
            # the difference of two near numbers is exact, or nearly, in their own dtype
            if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
                torch.addmm(self.sum_II, (y - x).t(), x, out_dtype=torch.float32, out=self.sum_II)
            else:
                self.sum_II.addmm_((y.float() - x.float()).t(), x.float())

    def clone(self) -> InputShift:
        """A sum of its own with the same contents."""
        copy = object.__new__(InputShift)
        copy.sum_II = self.sum_II.clone()
        return copy
