"""Which elements of a weight share one scale: the weight as a table of (scales, elements) and back.

Axes: O output channels, I input channels, S scales, E elements that share a scale, G scales of one output channel.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Strategy = Literal["tensor", "channel", "group", "block"]


class Granularity(NamedTuple):
    """A sharing pattern, as compressed-tensors names them.

    `tensor`: one scale; `channel`: one for each output channel; `group`: one for each run of `columns` input channels
    of each output channel; `block`: one for each tile of `rows` x `columns`, the last ones padded with zeros.
    """

    strategy: Strategy
    columns: int = 0
    rows: int = 0

    def shape(self, weight: torch.Size) -> tuple[int, ...]:
        """Shape that the scale of a weight of shape (O, I) is stored in."""
        out, width = weight
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "channel":
            return (out, 1)
        if self.strategy == "group":
            return (out, math.ceil(width / self.columns))
        return (math.ceil(out / self.rows), math.ceil(width / self.columns))

    def table(self, weight_OI: Tensor) -> Tensor:
        """The weight as (S, E), S in the row-major order of `shape`. A view where the layout allows it."""
        out, width = weight_OI.shape
        if self.strategy == "tensor":
            return weight_OI.reshape(1, -1)
        if self.strategy == "channel":
            return weight_OI
        if self.strategy == "group":
            return weight_OI.reshape(-1, self.columns)
        rows, columns = self.shape(weight_OI.shape)
        padding = (0, columns * self.columns - width, 0, rows * self.rows - out)
        tiles = torch.nn.functional.pad(weight_OI, padding).reshape(rows, self.rows, columns, self.columns)
        return tiles.transpose(1, 2).reshape(rows * columns, -1)

    def importance(self, importance_I: Tensor, weight: torch.Size) -> Tensor:
        """Importance of each input channel as (R, E) where R divides S: row s of the table has importance row s % R."""
        out, width = weight
        if self.strategy == "channel":
            return importance_I.reshape(1, -1)
        if self.strategy == "group":
            return importance_I.reshape(-1, self.columns)
        return self.table(importance_I.expand(out, width))

    def expand(self, scale: Tensor, weight: torch.Size) -> Tensor:
        """A stored scale or zero point as (O, G): one value per output channel and run of input channels."""
        out, _ = weight
        if self.strategy == "tensor":
            return scale.reshape(1, 1).expand(out, 1)
        if self.strategy == "block":
            return scale.repeat_interleave(self.rows, 0)[:out]
        return scale

    def group_of_column(self, width: int) -> list[int]:
        """For each of `width` input channels the column of `expand` that holds its scale."""
        if self.strategy in ("tensor", "channel"):
            return [0] * width
        return [column // self.columns for column in range(width)]
