"""Tiny random models of several kinds, each with batches of two sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from batches import token_batch
from tiny_llama import VOCABULARY, tiny_llama
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

Batches = list[dict[str, Any]]
IMAGE_TOKEN = 100


def decoder_only() -> tuple[nn.Module, Batches]:
    return tiny_llama(), [token_batch(2, 9, seed=1), token_batch(3, 14, seed=2, left=4)]


def encoder_decoder() -> tuple[nn.Module, Batches]:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    batches = [
        {**token_batch(2, 9, seed=1), "decoder_input_ids": token_batch(2, 5, seed=3)["input_ids"]},
        {**token_batch(3, 14, seed=2, right=4), "decoder_input_ids": token_batch(3, 7, seed=4)["input_ids"]},
    ]
    return _made(T5ForConditionalGeneration, config), batches


def vision_language() -> tuple[nn.Module, Batches]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)

    def batch(rows: int, length: int, seed: int) -> dict[str, Any]:
        made = token_batch(rows, length, seed=seed)
        made["input_ids"][made["input_ids"] == IMAGE_TOKEN] = 3
        made["input_ids"][:, 1:5] = IMAGE_TOKEN  # four patches each
        generator = torch.Generator().manual_seed(seed)
        return {**made, "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}

    return _made(LlavaForConditionalGeneration, config), [batch(2, 9, 1), batch(3, 12, 2)]


def speech() -> tuple[nn.Module, Batches]:
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )

    def batch(rows: int, length: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(rows, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": token_batch(rows, length, seed=seed)["input_ids"]}

    return _made(WhisperForConditionalGeneration, config), [batch(2, 5, 1), batch(3, 8, 2)]


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config)
    return model.eval().requires_grad_(False)


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "decoder-only": decoder_only,
    "encoder-decoder": encoder_decoder,
    "vision-language": vision_language,
    "speech": speech,
}
