"""How many samples make a batch, where nobody says."""

from __future__ import annotations

import torch
from torch import nn

_TOKENS = {"cpu": 2048}
_TOKENS_ON_ACCELERATORS = 8192
"""Tokens of a batch from which on a larger one runs no faster."""
_WIDTHS = 8
"""Values that a layer holds for each token, in multiples of its widest input."""
_SHARE = 1 / 16
"""Part of the device's memory that they may take."""


def samples_a_batch(model: nn.Module, seq_len: int, device: torch.device) -> int:
    """Samples of `seq_len` tokens that keep `device` busy, at least one, within a sixteenth of its memory."""
    tokens = _TOKENS.get(device.type, _TOKENS_ON_ACCELERATORS)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        token = max((m.in_features * m.weight.element_size() for m in linear), default=1) * _WIDTHS
        tokens = min(tokens, int(_SHARE * total / token))
    return max(1, tokens // seq_len)
