"""An encoder in remote code: relative positions as a shared buffer, layers in a dict, pooling over real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class HeronConfig(PretrainedConfig):
    """Sizes."""

    model_type = "remote_heron"

    def __init__(self, vocab_size: int = 256, hidden_size: int = 64, depth: int = 3, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size, self.depth = vocab_size, hidden_size, depth
        super().__init__(**kwargs)


class HeronLayer(nn.Module):
    """One head of attention with a bias, then a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, *, states: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.norm(states["hidden"])
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5 + states["bias"]
        mixed = self.out(scores.softmax(-1) @ self.v(x) * self.gate(x).sigmoid())
        return {**states, "hidden": states["hidden"] + mixed}


class HeronModel(PreTrainedModel):
    """Values travel in a dict from layer to layer."""

    config_class = HeronConfig
    _no_split_modules = ["HeronLayer"]  # noqa: RUF012

    def __init__(self, config: HeronConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative = nn.Embedding(17, 1)
        self.layers = nn.ModuleDict({f"layer_{i}": HeronLayer(config.hidden_size) for i in range(config.depth)})
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        positions = torch.arange(input_ids.size(-1), device=input_ids.device)
        bias = self.relative((positions[None, :] - positions[:, None]).clamp(-8, 8) + 8).squeeze(-1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        bias = bias[None].masked_fill(attention_mask[:, None, :] == 0, float("-inf"))
        states = {"hidden": self.embed(input_ids), "bias": bias}
        for layer in self.layers.values():
            states = layer(states=states)
        weights = attention_mask[..., None].to(states["hidden"].dtype)
        pooled = (states["hidden"] * weights).sum(1) / weights.sum(1)
        return BaseModelOutputWithPooling(last_hidden_state=states["hidden"], pooler_output=pooled)
