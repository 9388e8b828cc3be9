"""Modules whose parameters are gains of their output channels: norms of any class, learned scales.

Whether a module is one is found by running it on a few random numbers with random parameters, so no class is listed
and no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_TOLERANCE = 1e-3
_ROWS = 3


@dataclass(frozen=True)
class Gain:
    """How the output channels of a module are scaled through its parameters, each of them (channels,)."""

    channels: int
    offsets: Mapping[str, float]
    """Parameter -> 0 where it scales with its channel, 1 where 1 plus it does (`x * (1 + weight)`)."""


def may_be_gain(module: nn.Module) -> bool:
    """Whether `module` has one or two parameters, both vectors of one size, and no modules below it."""
    sizes = {parameter.shape for parameter in module.parameters(recurse=False)}
    count = len(list(module.parameters(recurse=False)))
    return count in (1, 2) and len(sizes) == 1 and len(next(iter(sizes))) == 1 and not list(module.children())


def gain_of(module: nn.Module) -> Gain | None:
    """The gain of `module`, a function of one tensor (..., channels); None where it is none."""
    if not may_be_gain(module):
        return None
    shapes = {name: parameter.shape[0] for name, parameter in module.named_parameters(recurse=False)}
    channels = next(iter(shapes.values()))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = {name: draw(channels) for name in shapes}
    buffers: dict[str, Any] = {
        name: torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
        for name, buffer in module.named_buffers()
    }
    inputs, scale = draw(2, _ROWS, channels), torch.exp(draw(channels) / 2)
    expected = _output(module, {**buffers, **given}, inputs)
    if expected is None or expected.shape != inputs.shape:
        return None
    for offsets in product((0.0, 1.0), repeat=len(shapes)):
        chosen = dict(zip(shapes, offsets, strict=True))
        scaled = {name: (value + chosen[name]) * scale - chosen[name] for name, value in given.items()}
        found = _output(module, {**buffers, **scaled}, inputs)
        if found is not None and torch.allclose(found, expected * scale, rtol=_TOLERANCE, atol=_TOLERANCE):
            return Gain(channels, chosen)
    return None


def _output(module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            output = functional_call(module, parameters, (inputs,))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # it takes other arguments: no gain that is known of
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else None
