"""A mixture of experts in remote code: data-dependent routing, and one layer that is called twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class OwlConfig(PretrainedConfig):
    """Sizes."""

    model_type = "remote_owl"

    def __init__(
        self, vocab_size: int = 256, hidden_size: int = 64, num_layers: int = 2, num_experts: int = 4, **kwargs: Any
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_layers, self.num_experts = num_layers, num_experts
        super().__init__(**kwargs)


@dataclass
class OwlOutput(ModelOutput):
    """Logits, and which expert each layer chose for each token."""

    logits: Tensor | None = None
    router_choices: tuple[Tensor, ...] | None = None


class OwlExperts(nn.Module):
    """Top-1 routing over a loop of those experts that got tokens."""

    def __init__(self, config: OwlConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for index in choice.unique().tolist():
            rows = (choice == index).nonzero().squeeze(-1)
            out[rows] = self.experts[index](flat[rows]) * weight[rows, None]
        return out.view_as(x), choice.view(x.shape[:-1])


class OwlLayer(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, config: OwlConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.experts = OwlExperts(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x))[:, None].chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[:, 0]
        mixed, choice = self.experts(self.norm2(x))
        return x + mixed, choice


class OwlForCausalLM(PreTrainedModel):
    """Every layer, and the first once more at the end."""

    config_class = OwlConfig
    _no_split_modules = ["OwlLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: OwlConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OwlLayer(config) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> OwlOutput:
        mask = None
        if attention_mask is not None and not attention_mask.all():
            length = input_ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
            mask = causal[None, None] & attention_mask[:, None, None, :].bool()
            mask = mask | torch.eye(length, dtype=torch.bool, device=input_ids.device)
        x = self.embed(input_ids)
        choices = []
        for layer in [*self.layers, self.layers[0]]:
            x, choice = layer(x, mask)
            choices.append(choice)
        return OwlOutput(logits=self.lm_head(x), router_choices=tuple(choices))
