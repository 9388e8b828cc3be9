"""A tiny Llama model, and the shortest loop that calibrates it layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxcalib.modifiers import Modifier, ModuleResult, Scope


def tiny_llama(*, dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    """Two decoder layers of width 64 with a vocabulary of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    # Buffers stay float32, as in a model that was loaded in `dtype`.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def token_batches(count: int = 4, length: int = 24) -> list[torch.Tensor]:
    """Batches (2, length) of random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (2, length), generator=generator) for _ in range(count)]


def scope_of(model: nn.Module, prefix: str, index: int = 0) -> Scope:
    """The scope of the module named `prefix` and what is in it; everything for an empty prefix."""
    inside = {
        name: module
        for name, module in model.named_modules()
        if not prefix or name == prefix or name.startswith(prefix + ".")
    }
    return Scope(model, index, inside)


def calibrate(
    model: LlamaForCausalLM,
    modifier: Modifier,
    batches: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor] | None = None,
) -> list[ModuleResult]:
    """Attach, then calibrate and commit each decoder layer and the rest after them, then detach."""
    modifier.attach(model)
    results = []
    prefixes = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    for index, prefix in enumerate([*prefixes, ""]):
        scope = scope_of(model, prefix, index)
        with modifier.observe(scope), torch.no_grad():
            for number, batch in enumerate(batches):
                scope.batch.index = number
                scope.batch.token_mask = None if masks is None else masks[number]
                model(input_ids=batch, attention_mask=None if masks is None else masks[number].long())
        results += modifier.commit(scope)
    modifier.detach(model)
    return results
