"""A source of channels and the parameters that read them, so that a factor can move from the one to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A parameter that is contracted with the channels of a source."""

    module: str
    """Qualified name of the module that owns it."""
    parameter: str
    """`weight` for linear modules."""
    axis: int
    """The axis of input channels: 1 for linear modules."""
    channels: range | tuple[int, ...]
    """For each input channel the channel of the source whose factor it carries; -1 for none."""

    @property
    def path(self) -> str:
        """Qualified name of the parameter."""
        return f"{self.module}.{self.parameter}"

    def index(self, device: torch.device) -> Tensor:
        """`channels` as int64 (input channels,)."""
        if isinstance(self.channels, range):
            return torch.arange(len(self.channels), device=device)
        return torch.tensor(self.channels, device=device)


@dataclass(frozen=True)
class ChannelMapping:
    """Dividing channel c of `source` by s_c and multiplying what reads it by s_c changes nothing of the model."""

    source: str
    """Qualified name of the module whose output channels are scaled."""
    channels: int
    """How many output channels it has."""
    offsets: Mapping[str, float]
    """Its parameters that have output channels as their first axis -> 0 where they scale, 1 where 1 plus them does."""
    readers: tuple[Reader, ...]
    kept: tuple[int, ...] = ()
    """Channels that may not be scaled, as something else depends on them."""
    observed: str | None = None
    """Module whose inputs tell the channels' magnitudes; None for those of the readers."""

    @property
    def modules(self) -> frozenset[str]:
        """Names of all modules that are changed."""
        return frozenset({self.source, *(reader.module for reader in self.readers)})

    def __str__(self) -> str:
        count = f" ({self.channels - len(self.kept)} of {self.channels} channels)" if self.kept else ""
        return f"{self.source}{count} -> {', '.join(reader.module for reader in self.readers)}"
