"""How many samples make a batch, where nobody says."""

from __future__ import annotations

import torch
from torch import nn

_TOKENS_ON_CPU = 2048
"""Tokens of a batch from which on a larger one runs no faster."""
_VALUES = 1 << 26
"""The same for accelerators, in values of the widest input of a linear module: 4096 tokens of Llama 8B."""
_MOST_TOKENS = 32768
_WIDTHS = 8
"""Values that a layer holds for each token, in multiples of its widest input."""
_SHARE = 1 / 16
"""Part of the device's memory that they may take."""


def samples_a_batch(model: nn.Module, seq_len: int, device: torch.device) -> int:
    """Samples of `seq_len` tokens that keep `device` busy, at least one, within a sixteenth of its memory."""
    if device.type == "cpu":
        return max(1, _TOKENS_ON_CPU // seq_len)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tokens = min(_VALUES // max((m.in_features for m in linear), default=1), _MOST_TOKENS)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        token = max((m.in_features * m.weight.element_size() for m in linear), default=1) * _WIDTHS
        tokens = min(tokens, int(_SHARE * total / token))
    return max(1, tokens // seq_len)
