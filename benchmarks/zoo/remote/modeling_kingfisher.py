"""A language model that sees, in remote code: image features are put in the place of placeholder tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class KingfisherConfig(PretrainedConfig):
    """Sizes."""

    model_type = "remote_kingfisher"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_layers: int = 2,
        image_token_id: int = 255,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.image_token_id, self.image_size = image_token_id, image_size
        super().__init__(**kwargs)


class KingfisherLayer(nn.Module):
    """Pre-norm attention with rotary positions, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k = self._rotate(q, *rotary), self._rotate(k, *rotary)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        x = x + self.o(scores.softmax(-1) @ v)
        mixed: Tensor = x + self.down(nn.functional.silu(self.up(self.norm2(x))))
        return mixed

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KingfisherVision(nn.Module):
    """Patches through two layers."""

    def __init__(self, config: KingfisherConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(config.hidden_size, 4, 2 * config.hidden_size, batch_first=True)
            for _ in range(2)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x: Tensor = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


class KingfisherForCausalLM(PreTrainedModel):
    """Text with images between."""

    config_class = KingfisherConfig
    _no_split_modules = ["KingfisherLayer", "TransformerEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: KingfisherConfig) -> None:
        super().__init__(config)
        self.vision = KingfisherVision(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KingfisherLayer(config.hidden_size) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> CausalLMOutput:
        x = self.embed(input_ids)
        if pixel_values is not None:
            where = input_ids == self.config.image_token_id
            features = self.vision(pixel_values)
            if where.sum() != features.shape[0] * features.shape[1]:
                raise ValueError("as many placeholders are needed as there are image features")
            x = x.masked_scatter(where[..., None], features)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, :].bool()
        positions = attention_mask.cumsum(-1) - 1 if attention_mask is not None else torch.arange(length)[None]
        half = x.shape[-1] // 2
        angles = positions[..., None] * 100.0 ** (-torch.arange(half, device=x.device) / half)
        rotary = (angles.cos(), angles.sin())
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
