"""Language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.zoo.configs import DROP, Correction, config_class, tiny_config
from benchmarks.zoo.inputs import Batch, Builder, Draw, right_padded_mask, text_batch
from benchmarks.zoo.shrinking import HEAD_DIM, KEY_VALUE_HEADS

_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 100,
    "ple_embed_dim": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "hc_lowrank": 16,
}
_COMPASS = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        for kind in ("full_attention", "sliding_attention")
    }
}
_XLM = {"emb_dim": 64, "n_words": 256, "n_heads": 4, "n_layers": 2}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}
_GROUPED = {"head_dim": 16, "num_key_value_heads": 2}

CONFIGS: dict[str, Correction] = {
    "bamba": _MAMBA_HEADS,
    "granitemoehybrid": _MAMBA_HEADS,
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA_HEADS},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 64,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "use_mamba_kernels": False,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "hybrid_layer_ids": [1, 3],
        "use_mamba_kernels": False,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_hash_byte_group_size": [3, 4],
        "vocab_size": 260,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260, "hidden_size_global": 64},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 64},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "qk_nope_head_dim": 16,
        "head_dim": 8,
        "mlp_layer_types": DROP,
        "first_k_dense_replace": 1,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": _GROUPED,
    "hunyuan_v1_moe": _GROUPED,
    "ministral": _GROUPED,
    "nemotron": _GROUPED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4, "expert_ffn_hidden_size": 64},
    "qwen3_next": {
        "num_experts": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "gemma4_text": {"per_layer_config": DROP},
    "gemma4_unified_text": {"per_layer_config": DROP},
    "neomme": {"per_layer_config": DROP},
    "gemma4_unified": {"text_config": {"per_layer_config": DROP}},
    "diffusion_gemma": {
        "text_config": {"per_layer_config": DROP, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "xmod": {"default_language": "en_XX"},
    "xlm": _XLM,
    "flaubert": _XLM,
    "esm": {"vocab_size": 33, "emb_layer_norm_before": False, "mask_token_id": 32, "pad_token_id": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 16,
        "feed_forward_size": 128,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_buckets": 4,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "hash_seed": 0,
    },
    "perceiver": {
        "d_latents": 64,
        "num_latents": 16,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
        "vocab_size": 262,
        "_label_trainable_num_channels": 64,
    },
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "ReformerForMaskedLM": {"is_decoder": False},
    "ReformerForSequenceClassification": {"is_decoder": False},
    "ReformerForQuestionAnswering": {"is_decoder": False},
}


def _dbrx() -> PretrainedConfig:
    config = config_class("dbrx")(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=256,
        attn_config={"kv_n_heads": 2},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    )
    config.attn_config.rope_theta = 10000.0
    config.attn_config.clip_qkv = 8.0
    made: PretrainedConfig = config
    return made


_PER_LAYER_KEYS = ("num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input")


def _assistant(family: str) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        text = tiny_config(f"{family}_text").to_dict()
        text.pop("per_layer_config", None)  # derived anew
        made: PretrainedConfig = config_class(f"{family}_assistant")(
            text_config={**text, **dict.fromkeys(_PER_LAYER_KEYS, 0)},
            backbone_hidden_size=64,
            num_centroids=8,
            centroid_intermediate_top_k=4,
        )
        return made

    return make


FACTORIES: dict[str, Callable[[], PretrainedConfig]] = {
    "dbrx": _dbrx,
    "musicgen": lambda: tiny_config("musicgen_decoder"),
    "musicgen_melody": lambda: tiny_config("musicgen_melody_decoder"),
    "gemma4_assistant": _assistant("gemma4"),
    "gemma4_unified_assistant": _assistant("gemma4_unified"),
}


def _codebooks(draw: Draw) -> Batch:
    batch = text_batch(draw)
    rows, length = batch["input_ids"].shape
    return {"input_ids": draw.ids(rows * 4, length), "attention_mask": batch["attention_mask"]}


def _perceiver(draw: Draw) -> Batch:
    batch = text_batch(draw)
    return {"inputs": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _assistant_inputs(draw: Draw) -> Batch:
    """Hidden states of the main model, and keys and values of its last layers."""
    config: Any = draw.config
    queries, keys = draw.pick(3, 5), draw.pick(12, 17)
    shared = {
        kind: tuple(draw.normal(draw.rows, KEY_VALUE_HEADS, keys, HEAD_DIM) for _ in range(2))
        for kind in ("sliding_attention", "full_attention")
    }
    return {
        "inputs_embeds": draw.normal(draw.rows, queries, 2 * config.backbone_hidden_size),
        "position_ids": torch.arange(keys, keys + queries).expand(draw.rows, -1).contiguous(),
        "attention_mask": right_padded_mask(draw, keys, draw.pick(2, 5)),
        "shared_kv_states": shared,
    }


INPUTS: dict[str, Builder] = {
    "Gemma4AssistantForCausalLM": _assistant_inputs,
    "Gemma4UnifiedAssistantForCausalLM": _assistant_inputs,
    "MusicgenForCausalLM": _codebooks,
    "MusicgenMelodyForCausalLM": _codebooks,
    "PerceiverForMaskedLM": _perceiver,
    "PerceiverForSequenceClassification": _perceiver,
}
