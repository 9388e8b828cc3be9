"""Language models that see, whose images are pixels of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.zoo.configs import Correction, merge, tiny_config
from benchmarks.zoo.families.images import packed_patches
from benchmarks.zoo.inputs import Batch, Builder, Draw, decoder_text, image_size, text_batch
from benchmarks.zoo.multimodal import image_language, vision_language
from benchmarks.zoo.shrinking import Config

_QUERIES: Mapping[str, Any] = {
    "image_token_index": 255,
    "num_query_tokens": 4,
    "qformer_config": {"encoder_hidden_size": 64},
}
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_HIGH_RESOLUTION: Mapping[str, Any] = {
    "window_size": 2,
    "global_attn_indexes": [1],
    "output_channels": 32,
    "scale": 8,
    "num_pos_feats": 16,
    "mlp_dim": 64,
    "image_size": 32,
    "patch_size": 8,
}
_KOSMOS: Mapping[str, Any] = {"latent_query_num": 4, "text_config": {"layers": 2, "attention_heads": 4}}


def _aria(config: Config) -> Config:
    return {**config, "projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4}


def _granite4(config: Config) -> Config:
    merge(config, {"image_grid_pinpoints": _PINPOINTS})
    config["text_config"] = tiny_config("granite").to_dict()
    has_class_token = config["vision_config"]["model_type"] == "clip_vision_model"
    return merge(
        config,
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [0, 1, 0, 1],
            "image_seq_length": 4,
            "vision_feature_select_strategy": "default" if has_class_token else "full",
            "qformer_config": {"encoder_hidden_size": 64},
        },
    )


CONFIGS: dict[str, Correction] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "ShieldGemma2ForImageClassification": {"yes_token_index": 100, "no_token_index": 101},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "aria": _aria,
    "blip": {"text_config": {"encoder_hidden_size": 64, "vocab_size": 256}},
    "blip-2": _QUERIES,
    "instructblip": {**_QUERIES, "video_token_index": 254},
    "instructblipvideo": {**_QUERIES, "video_token_index": 254},
    "chameleon": {
        "vocabulary_map": {"<image>": 255} | {f"IMGIMG{str(k).translate(_LETTERS)}Z": 100 + k for k in range(8)},
        "image_token_id": 255,
        "vq_config": {
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "resolution": 32,
            "latent_channels": 32,
            "embed_dim": 32,
        },
    },
    "emu3": {
        "pad_token_id": 0,
        "image_token_id": 200,
        "vocabulary_map": {"<image>": 200, "<|extra_200|>": 201}
        | {f"<|visual token {k:06d}|>": 100 + k for k in range(8)},
        "text_config": {"vocab_size": 256, "pad_token_id": 0},
        "vq_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "embed_dim": 8,
            "hidden_size": 32,
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": _HIGH_RESOLUTION},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "embed_dim": [32, 64],
            "num_heads": [4, 4],
            "num_groups": [4, 4],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 64,
            "drop_path_rate": 0.0,
        }
    },
    "idefics": {
        "vision_config": {"embed_dim": 64, "image_size": 32, "patch_size": 8},
        "perceiver_config": {
            "resampler_n_latents": 4,
            "resampler_head_dim": 16,
            "resampler_n_heads": 4,
            "resampler_depth": 2,
        },
        "additional_vocab_size": 0,
    },
    "idefics2": {
        "perceiver_config": {
            "resampler_n_latents": 4,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
            "resampler_depth": 2,
            "hidden_size": 64,
        }
    },
    "idefics3": {"vision_config": {"patch_size": 8, "image_size": 32}},
    "smolvlm": {"vision_config": {"patch_size": 8, "image_size": 32}},
    "janus": {
        "vision_config": {"projection_dim": 64, "num_image_tokens": 16},
        "vq_config": {
            "num_embeddings": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
    },
    "kosmos-2": _KOSMOS,
    "kosmos-2.5": {
        **_KOSMOS,
        "vision_config": {"patch_embed_hidden_size": 192, "head_dim": 16, "max_num_patches": 16},
    },
    "lfm2_vl": {"vision_config": {"num_patches": 16}},
    "llama4": {
        "vision_config": {
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "intermediate_size": 256,
            "pixel_shuffle_ratio": 0.5,
        },
        "text_config": {"num_hidden_layers": 3},
    },
    "llava_next": {"image_grid_pinpoints": _PINPOINTS},
    "llava_next_video": {"image_grid_pinpoints": _PINPOINTS},
    "llava_onevision": {"image_grid_pinpoints": _PINPOINTS, "vision_aspect_ratio": "anyres_max_9"},
    "granite4_vision": _granite4,
    "mllama": {
        "vision_config": {
            "attention_heads": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 128,
            "max_num_tiles": 4,
        },
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    },
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 192, "d_kv": 16, "seq_len": 128}},
    "udop": {"image_size": 32, "patch_size": 8},
    "vipllava": {"vision_feature_layers": [-2, -1, 1]},
}


def _pixels(draw: Draw) -> Batch:
    return {"pixel_values": draw.images()}


def _queries(draw: Draw, images: Batch) -> list[int]:
    return [4] * draw.rows


def _instructed(draw: Draw) -> Batch:
    ids = draw.ids(draw.rows, draw.pick(5, 7))
    return {**_pixels(draw), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _beside_text(draw: Draw) -> Batch:
    """Images that need no placeholders."""
    return {**text_batch(draw), **_pixels(draw)}


def _chameleon_tokens(draw: Draw, images: Batch) -> list[int]:
    model: Any = draw.model
    with torch.no_grad():
        return [model.model.get_image_tokens(images["pixel_values"][:1]).numel()] * draw.rows


def _masked_pixels(draw: Draw) -> Batch:
    """One image a row, with the mask of its real pixels."""
    mask = torch.ones(draw.rows, 1, *image_size(draw.vision_config), dtype=torch.bool)
    return {"pixel_values": draw.images(1), "pixel_attention_mask": mask}


def _image_positions(draw: Draw) -> Batch:
    batch = text_batch(draw, lengths=(14, 19))
    where = torch.zeros_like(batch["input_ids"])
    where[:, 4:8] = 1
    return {**batch, "image_embeds_position_mask": where}


def _numbered_patches(draw: Draw) -> torch.Tensor:
    """Flattened patches (rows, 16, 2 + 192), each led by its row and column."""
    patches = draw.normal(draw.rows, 16, 194)
    for index in range(16):
        patches[:, index, 0], patches[:, index, 1] = 1 + index // 4, 1 + index % 4
    return patches


def _pix2struct(draw: Draw) -> Batch:
    return {
        "flattened_patches": _numbered_patches(draw),
        "attention_mask": torch.ones(draw.rows, 16),
        "decoder_input_ids": draw.ids(draw.rows, draw.pick(7, 10)),
    }


def _sized(draw: Draw) -> Batch:
    sizes = torch.tensor([[32, 32], [32, 16], [16, 32]][: draw.rows])
    return {"pixel_values": draw.images(size=(32, 32)), "image_sizes": sizes}


def _tiled(draw: Draw) -> Batch:
    """Images of any shape as tiles (rows, tiles, channels, height, width)."""
    sizes = torch.tensor(draw.pick([[32, 64], [32, 48]], [[64, 32], [64, 64], [32, 64]]))
    return {"pixel_values": draw.images(draw.pick(3, 5), size=(32, 32)), "image_sizes": sizes}


def _mllama(draw: Draw) -> Batch:
    batch = text_batch(draw)
    rows, length = batch["input_ids"].shape
    tiles, used = 4, draw.pick(2, 1)
    mask = torch.zeros(rows, 1, tiles, dtype=torch.long)
    mask[:, :, :used] = 1
    return {
        **batch,
        "pixel_values": draw.images(1, tiles),
        "aspect_ratio_ids": torch.tensor([[used]] * rows),
        "aspect_ratio_mask": mask,
        "cross_attention_mask": mask[:, None].expand(rows, length, 1, tiles).contiguous(),
    }


def _idefics(draw: Draw) -> Batch:
    batch = text_batch(draw)
    mask = torch.ones(*batch["input_ids"].shape, 1, dtype=torch.long)
    return {**batch, "pixel_values": draw.images(1), "image_attention_mask": mask}


def _udop(draw: Draw) -> Batch:
    batch = text_batch(draw)
    boxes = draw.uniform(*batch["input_ids"].shape, 4).sort(-1).values
    images = draw.images(size=(32, 32))
    return {**batch, "bbox": boxes, "pixel_values": images, **decoder_text(draw, mask=False)}


def _emu3(draw: Draw) -> Batch:
    return {"pixel_values": draw.images(size=(32, 32)), "image_sizes": torch.tensor([[32, 32]] * draw.rows)}


def _high_resolution(draw: Draw) -> Batch:
    return {name: draw.images(size=(32, 32)) for name in ("pixel_values", "high_res_pixel_values")}


INPUTS: dict[str, Builder] = {
    "image_text_to_text/blip": _beside_text,
    "image_text_to_text/git": _beside_text,
    "BlipForQuestionAnswering": lambda draw: {**_beside_text(draw), **decoder_text(draw)},
    "blip-2": vision_language(_pixels, _queries),
    "instructblip": vision_language(_instructed, _queries),
    "instructblipvideo": vision_language(
        lambda draw: {**_instructed(draw), "pixel_values": draw.images(4)},
        lambda draw, images: [16] * draw.rows,
        lambda draw: 254,
    ),
    "Emu3ForConditionalGeneration": vision_language(_emu3, token=lambda draw: 200),
    "chameleon": vision_language(
        lambda draw: {"pixel_values": draw.images(size=(32, 32))}, _chameleon_tokens, lambda draw: 255
    ),
    "deepseek_vl_hybrid": vision_language(_high_resolution),
    "florence2": vision_language(lambda draw: {"pixel_values": draw.images(size=(32, 32))}),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), vision_language(_masked_pixels)),
    "kosmos-2": lambda draw: {**_image_positions(draw), **_pixels(draw)},
    "kosmos-2.5": lambda draw: {**_image_positions(draw), "flattened_patches": _numbered_patches(draw)},
    "lfm2_vl": vision_language(lambda draw: packed_patches(draw, draw.vision_config)),
    "lighton_ocr": vision_language(_sized),
    "mistral3": vision_language(_sized),
    "image_text_to_text/llama4": vision_language(
        lambda draw: {**_pixels(draw), "vision_feature_select_strategy": "default"}
    ),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), vision_language(_tiled)),
    "image_text_to_text/mistral4": text_batch,
    "image_text_to_text/mllama": _mllama,
    "pix2struct": _pix2struct,
    "pp_formulanet": lambda draw: {**_pixels(draw), **decoder_text(draw, mask=False)},
    "ShieldGemma2ForImageClassification": image_language,
    "T5Gemma2ForConditionalGeneration": lambda draw: {**image_language(draw), **decoder_text(draw, mask=False)},
    "udop": _udop,
    "video_llava": vision_language(lambda draw: {"pixel_values_images": draw.images()}),
    "perception_lm": vision_language(lambda draw: {"pixel_values": draw.images(1)}),
    "idefics": _idefics,
    "diffusion_gemma": lambda draw: {**text_batch(draw), **decoder_text(draw, mask=False)},
    "fuyu": text_batch,
    "phi4_multimodal": text_batch,
}
