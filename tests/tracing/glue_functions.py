"""Functions that leave torch, as models call them; imported by name in the tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

CALLS: list[str] = []


class Pair(NamedTuple):
    """A named tuple, which must come back as one."""

    first: torch.Tensor
    second: torch.Tensor


def positions(mask: torch.Tensor) -> torch.Tensor:
    """(batch, sequence) int64 of 0 and 1 -> (batch, sequence) int64."""
    CALLS.append("positions")
    return torch.from_numpy(np.cumsum(mask.numpy(), -1))


def kept(mask: torch.Tensor) -> torch.Tensor:
    """The places of the ones: a size that depends on data."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def counted(mask: torch.Tensor) -> tuple[list[int], int]:
    """Numbers that depend on data."""
    return [int(n) for n in mask.numpy().sum(-1)], int(mask.numpy().sum())


def nested(given: dict[str, Any], *, scale: float, pair: Pair, output: BaseModelOutput) -> dict[str, Any]:
    """Containers in, containers out."""
    assert type(pair) is Pair
    assert type(output) is BaseModelOutput
    total = torch.from_numpy(given["both"][0].numpy() * np.float32(scale)).float() + given["both"][1] + pair.second
    return {
        "pair": Pair(total, pair.first),
        "output": BaseModelOutput(last_hidden_state=output[0] + total),
        "none": None,
    }


def zeroed(x: torch.Tensor) -> None:
    """Writes to its argument behind torch's back."""
    x.numpy()[...] *= 2


def drawn(x: torch.Tensor) -> torch.Tensor:
    """Draws a number that torch knows nothing of."""
    return x * torch.from_numpy(np.float32([random.random()]))


def array(mask: torch.Tensor) -> Any:
    """Something that no graph can follow."""
    return mask.numpy()


def waits(mask: torch.Tensor) -> Any:
    """A generator."""
    yield mask


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that holds the function in a closure."""

    @wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return outer


class Tools:
    """Functions as methods."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    @staticmethod
    def static(mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(mask.numpy() + 1)

    @classmethod
    def of_class(cls, mask: torch.Tensor) -> torch.Tensor:
        assert cls is Tools
        return torch.from_numpy(mask.numpy() + 2)


class Layers(nn.Module):
    """Two layers, with `glue` of the mask between them."""

    def __init__(self, glue: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.glue = glue

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x + self.between(mask)[..., None])

    def between(self, mask: torch.Tensor) -> torch.Tensor:
        return self.glue(mask)


class Method(Layers):
    """The glue is a method."""

    def between(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(mask.numpy() * self.layers[1].out_features)


def shared(x: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory of the argument."""
    return torch.from_numpy(x.numpy())
