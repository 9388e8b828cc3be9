"""Static quantization of module inputs by one kernel, for as long as fxcalib itself runs the committed modules.

compressed-tensors quantizes an input in half a dozen operations, each of which reads and writes the whole activation.
The kernel gives the same bits. Modules that were calibrated on one statistic have equal scales: of those that read the
very same tensor (q, k and v; gate and up) only the first quantizes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from torch import Tensor, nn

from fxcalib.math import kernels
from fxcalib.math.grids import Grid
from fxcalib.modifiers import qargs

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class FusedInputs:
    """The modules whose forward is replaced, and the forwards that they had."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor]]] = []

    def replace(self, modules: list[tuple[nn.Module, QuantizationScheme, object | None]]) -> None:
        """Replace the forwards of those committed `modules` that the kernel serves.

        With each module come its scheme and the statistic that its input scale was made of, where there is one.
        """
        groups: dict[Hashable, _SharedInput] = {}
        for module, scheme, statistic in modules:
            args = scheme.input_activations
            if args is None or not _serves(module, scheme):
                continue
            grid = qargs.grid_of(args)
            # Equal keys, equal scales: what a scale is computed from, and how it is stored.
            key = (
                object() if statistic is None else id(statistic),
                grid,
                args.scale_dtype,
                module.input_scale.dtype,
                module.input_scale.device,
            )
            shared = groups.setdefault(key, _SharedInput(grid))
            shared.readers += 1
            before = module.__dict__["forward"]
            module.__dict__["forward"] = fused = _forward(module, before, shared)
            self._replaced.append((module, before, fused))

    def restore(self) -> None:
        """Give every module the forward back that it had."""
        for module, before, fused in self._replaced:
            if module.__dict__.get("forward") is fused:
                module.__dict__["forward"] = before
        self._replaced = []


@dataclass
class _SharedInput:
    """The input that one of `readers` modules read last, quantized, until all have read it or it is gone."""

    grid: Grid
    readers: int = 0
    _source: weakref.ref[Tensor] | None = None
    _quantized: Tensor | None = None
    _versions: tuple[int, int] = (0, 0)
    _waiting: int = 0

    def quantized(self, inputs: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        found = self._quantized
        same = found is not None and self._source is not None and self._source() is inputs
        if found is not None and same and self._versions == (inputs._version, found._version):
            self._waiting -= 1
        else:
            self._forget()
            found = kernels.fake_quantize(inputs, scale, zero_point, self.grid)
            if inputs.is_inference() or found.is_inference():  # their changes in place are not counted
                return found
            self._source, self._quantized = weakref.ref(inputs, self._gone), found
            self._versions, self._waiting = (inputs._version, found._version), self.readers - 1
        if self._waiting <= 0:
            self._forget()
        return found

    def _gone(self, source: weakref.ref[Tensor]) -> None:
        if source is self._source:
            self._forget()

    def _forget(self) -> None:
        self._source = self._quantized = None


def _serves(module: nn.Module, scheme: QuantizationScheme) -> bool:
    args = scheme.input_activations
    return (
        args is not None
        and args.strategy == QuantizationStrategy.TENSOR
        and args.dynamic is False
        and (args.type == "int" or args.num_bits == 8)
        and scheme.output_activations is None
        and isinstance(module, nn.Linear)
        # compressed-tensors' forward, right around that of the class
        and getattr(module.__dict__.get("forward"), "__wrapped__", None) is type(module).forward
        and module.input_scale.dtype in _DTYPES
        and kernels.available(module.weight)
    )


def _forward(module: nn.Module, before: Callable[..., Tensor], shared: _SharedInput) -> Callable[..., Tensor]:
    @wraps(before)
    def forward(input: Tensor) -> Tensor:
        scale: Any = module.input_scale
        zero_point: Tensor | None = getattr(module, "input_zero_point", None)
        fits = (
            type(input) is Tensor
            and input.dtype == scale.dtype
            and input.device == scale.device
            and input.is_contiguous()
            and input.numel() > 0
            and (zero_point is None or zero_point.dtype == torch.int8)
            and kernels.available(input)
        )
        if not fits:
            return before(input)
        output: Tensor = type(module).forward(module, shared.quantized(input, scale, zero_point))
        return output

    return forward
