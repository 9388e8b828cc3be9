"""A decoder in the style of early remote code: ALiBi, masks by hand, and a mask that is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ParrotConfig(PretrainedConfig):
    """Sizes."""

    model_type = "remote_parrot"

    def __init__(
        self, vocab_size: int = 256, hidden_size: int = 64, n_layer: int = 3, n_head: int = 4, **kwargs: Any
    ) -> None:
        self.vocab_size, self.hidden_size, self.n_layer, self.n_head = vocab_size, hidden_size, n_layer, n_head
        super().__init__(**kwargs)


class ParrotBlock(nn.Module):
    """Attention and MLP side by side."""

    def __init__(self, config: ParrotConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.n_head = config.n_head
        self.ln = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, hidden_states: Tensor, alibi: Tensor, attention_mask: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        rows, length, width = hidden_states.shape
        normed = self.ln(hidden_states)
        q, k, v = self.query_key_value(normed).view(rows, length, self.n_head, -1).transpose(1, 2).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + alibi + attention_mask
        probabilities = scores.softmax(-1)
        context = (probabilities @ v).transpose(1, 2).reshape(rows, length, width)
        mlp = self.down(nn.functional.gelu(self.up(normed)))
        outputs = (hidden_states + self.dense(context) + mlp,)
        return (*outputs, probabilities) if output_attentions else outputs


class ParrotForCausalLM(PreTrainedModel):
    """Embedding, blocks, tied head."""

    config_class = ParrotConfig
    _no_split_modules = ["ParrotBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012

    def __init__(self, config: ParrotConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(ParrotBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def build_alibi(self, length: int, device: torch.device) -> Tensor:
        slopes = torch.tensor([2 ** (-8 * (i + 1) / self.config.n_head) for i in range(self.config.n_head)])
        distance = torch.arange(length, device=device)[None, :] - torch.arange(length, device=device)[:, None]
        return slopes.to(device)[None, :, None, None] * distance[None, None].float()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        return_dict = return_dict if return_dict is not None else True
        rows, length = input_ids.shape
        hidden_states = self.wte(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = torch.zeros(rows, 1, length, length, dtype=hidden_states.dtype, device=input_ids.device)
        lowest = torch.finfo(hidden_states.dtype).min
        mask[:, :, torch.ones(length, length, device=input_ids.device).triu(1).bool()] = lowest
        mask.masked_fill_(attention_mask[:, None, None, :] == 0, lowest)
        alibi = self.build_alibi(length, input_ids.device)
        every: tuple[Tensor, ...] = ()
        for _, block in enumerate(self.h):
            every = (*every, hidden_states)
            hidden_states = block(hidden_states, alibi=alibi, attention_mask=mask)[0]
        logits = self.lm_head(self.ln_f(hidden_states))
        if not return_dict:
            return (logits, *every)
        return CausalLMOutput(logits=logits, hidden_states=every)
