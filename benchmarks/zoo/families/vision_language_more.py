"""Language models that see, whose images are patches with a grid; and those that see something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.zoo.configs import DROP, Correction, config_class, merge
from benchmarks.zoo.errors import NotBuilt
from benchmarks.zoo.inputs import Batch, Builder, Draw, text_batch
from benchmarks.zoo.multimodal import grid, merged_patches, patches, vision_language
from benchmarks.zoo.shrinking import Config, shrink

_MERGING: Mapping[str, Any] = {"vision_config": {"out_hidden_size": 64, "spatial_merge_size": 2}}


def _gemma4(config: Config) -> Config:
    vision = shrink(config_class("gemma4_vision")().to_dict())
    vision.update(pooling_kernel_size=2, position_embedding_size=64, patch_size=8, num_key_value_heads=4)
    return merge(config, {"text_config": {"per_layer_config": DROP}, "vision_config": vision})


CONFIGS: dict[str, Correction] = {
    "deepseek_ocr2": {
        "vision_config": {
            "sam_config": {
                "downsample_channels": [64, 64],
                "window_size": 2,
                "global_attn_indexes": [1],
                "output_channels": 32,
                "image_size": 32,
                "scale": 8,
            }
        },
        "text_config": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [64, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        }
    },
    "gemma4": _gemma4,
    "kimi_k25": {"text_config": {"head_dim": 8}, "projection_hidden_size": 64},
    "minicpmv4_6": {"image_token_id": 255},
    "minimax_m3_vl": {"merged_hidden_size": 256},
    "muse_glimmer": {"out_hidden_size": 256},
    "glm5_next": {
        "text_config": {
            "index_topk": 8,
            "index_kpool": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "qk_head_dim": 16,
            "hc_mult": 2,
        },
        "vision_config": {"out_hidden_size": 64, "projection_intermediate_size": 64},
    },
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), _MERGING),
    "qwen2_5_vl": {
        "vision_config": {"out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1], "depth": 2}
    },
    "qwen2_vl": {"vision_config": {"hidden_size": 64, "embed_dim": 64}},
    "hunyuan_vl": {
        "text_config": {"head_dim": 16, "num_key_value_heads": 2},
        "vision_config": {"out_hidden_size": 64},
    },
    "step3p7": {
        "text_config": {
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "share_expert_dim": 64,
            "moe_intermediate_size": 64,
        }
    },
    "evolla": {
        "resampler_depth": 2,
        "resampler_dim_head": 16,
        "resampler_heads": 4,
        "resampler_num_latents": 4,
        "aligner_num_add_layers": 1,
        "aligner_ffn_mult": 2,
        "protein_encoder_config": {"vocab_size": 33},
    },
}


def _square_patches(draw: Draw) -> Batch:
    """Patches (patches, channels, height, width) with a grid."""
    config: Any = draw.vision_config
    sizes = grid(draw)
    pixels = draw.normal(int(sizes.prod(1).sum()), 3, config.patch_size, config.patch_size)
    return {"pixel_values": pixels, "image_grid_thw": sizes}


def _with_line_ends(draw: Draw, images: Batch) -> list[int]:
    """One placeholder for two by two patches, one more at the end of each row of them, and two for the whole."""
    return [int(height // 2 * (width // 2 + 1) + 2) for _, height, width in images["image_grid_thw"].tolist()]


def _merge_sizes(draw: Draw) -> Batch:
    images = patches(draw, temporal=1, channels=3)
    return {**images, "image_merge_sizes": torch.tensor([2] * len(images["image_grid_thw"]))}


def _gemma4_patches(draw: Draw) -> Batch:
    axis = torch.arange(4)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, 16, 2)
    return {
        "pixel_values": draw.uniform(draw.rows, 16, 192),
        "image_position_ids": positions.repeat(draw.rows, 1, 1),
    }


def _strip(draw: Draw) -> Batch:
    """All images beside each other in one strip, with the size of each in patches."""
    return {
        "pixel_values": draw.normal(1, 3, 8, 8 * 16 * draw.rows),
        "target_sizes": torch.tensor([[4, 4]] * draw.rows),
    }


def _evolla(draw: Draw) -> Batch:
    proteins = draw.integers(4, 24, draw.rows, 9)
    return {**text_batch(draw), "protein_input_ids": proteins, "protein_attention_mask": torch.ones_like(proteins)}


def _robot(draw: Draw) -> Batch:
    raise NotBuilt("inputs", "a robot's policy: takes noise and actions")


INPUTS: dict[str, Builder] = {
    "kimi_k25": vision_language(_square_patches, merged_patches(4)),
    "paddleocr_vl": vision_language(_square_patches, merged_patches(4)),
    "Gemma4ForConditionalGeneration": vision_language(_gemma4_patches),
    "minicpmv4_6": vision_language(_strip),
    "muse_glimmer": vision_language(lambda draw: patches(draw, temporal=2, channels=3), merged_patches(4)),
    "hunyuan_vl": vision_language(lambda draw: patches(draw, temporal=1, channels=3), _with_line_ends),
    "video_llama_3": vision_language(_merge_sizes, merged_patches(4)),
    "evolla": _evolla,
    "pi0": _robot,
}
