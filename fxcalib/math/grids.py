"""What a quantized number can be: the grid of codes, and the dtype that its scale is stored in."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M3_MAX = 7.5
E2M1_MAX = 6.0


class Grid(NamedTuple):
    """The codes that a value may take before it is multiplied by its scale.

    `int` grids hold the integers of two's complement with `bits` bits, signed also where the zero point moves
    (compressed-tensors' convention). `float` grids are OCP E4M3 (8 bits, finite maximum 448; OCP FP8 specification),
    E2M3 (6 bits, maximum 7.5) and E2M1 (4 bits, maximum 6; both OCP Microscaling formats specification v1.0, 5.3).
    """

    kind: Literal["int", "float"]
    bits: int
    symmetric: bool = True

    @property
    def low(self) -> float:
        """The smallest code."""
        return -float(2 ** (self.bits - 1)) if self.kind == "int" else -self.high

    @property
    def high(self) -> float:
        """The largest code."""
        if self.kind == "int":
            return float(2 ** (self.bits - 1) - 1)
        return {8: E4M3_MAX, 6: E2M3_MAX, 4: E2M1_MAX}[self.bits]

    @property
    def half_range(self) -> float:
        """The code that the largest magnitude maps to in a symmetric min-max scale: 7.5 for 4-bit integers."""
        return (self.high - self.low) / 2

    def round_(self, codes: Tensor) -> Tensor:
        """Round float32 `codes` of any shape to the nearest code, ties to even, in place; returns them."""
        if self.kind == "int":
            return codes.round_().clamp_(self.low, self.high)
        codes.clamp_(self.low, self.high)
        if self.bits == 8:
            return codes.copy_(codes.to(torch.float8_e4m3fn))
        # E2M1 steps by 0.5 below 2, by 1 below 4, by 2 up to 6, E2M3 by a quarter of that: the step of the own binade,
        # which is what is left of a float32 without its mantissa
        finest = 0.5 if self.bits == 4 else 0.125
        binade = codes.abs().clamp_(min=1.0).view(torch.int32).bitwise_and_(0x7F800000)
        step = binade.view(torch.float32).mul_(finest)
        return codes.div_(step).round_().mul_(step)


class ScaleFormat(NamedTuple):
    """How a scale is stored, so that it can be rounded before anything is quantized with it."""

    dtype: torch.dtype = torch.float32
    """Dtype whose values the stored scale takes."""
    power_of_two: bool = False
    """Microscaling (E8M0) scales: powers of two only."""
    global_scale: Tensor | None = None
    """Two-level scales (NVFP4): the stored scale is `global_scale` times the scale that multiplies the codes."""

    def stored(self, scale: Tensor) -> Tensor:
        """float32 values of `dtype` nearest to `scale` (any shape, float32, not negative); zero becomes an epsilon."""
        if self.power_of_two:
            tiny = torch.finfo(torch.bfloat16).tiny
            return torch.exp2(torch.floor(torch.log2(scale.clamp(min=tiny)) + 0.5))
        if self.global_scale is not None:
            scale = scale * self.global_scale
        info = torch.finfo(self.dtype)
        largest = min(info.max, torch.finfo(scale.dtype).max)  # of float64, the largest is no float32
        rounded = scale.clamp(max=largest).to(self.dtype).float()
        return torch.where(rounded == 0, float(info.eps), rounded)

    def effective(self, stored: Tensor) -> Tensor:
        """The factor of the codes that a `stored` scale stands for."""
        return stored if self.global_scale is None else stored / self.global_scale
