"""The model of tracing_debug.ipynb. One of its functions leaves torch, so that it cannot be traced as it is."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Number the tokens of each row without the padding: (batch, sequence) int64, ones and zeros -> int64."""
    counted = np.cumsum(mask.numpy(), axis=-1) - 1
    return torch.from_numpy(counted.clip(min=0))


class Layer(nn.Module):
    """Two linear layers around a nonlinearity, with the positions beside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden) * turns)))


class Reader(nn.Module):
    """Embeds tokens, takes them through its layers, and scores the vocabulary."""

    def __init__(self, vocabulary: int = 64, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        turns = torch.cos(positions_of(attention_mask) / 100.0)[..., None]
        hidden = self.tokens(input_ids)
        if not attention_mask.all():
            hidden = hidden * attention_mask[..., None]
        for layer in self.layers:
            hidden = layer(hidden, turns)
        return self.head(hidden)
