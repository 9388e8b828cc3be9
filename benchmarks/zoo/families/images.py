"""Image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.zoo.configs import Correction, merge
from benchmarks.zoo.inputs import Batch, Builder, Draw, image_size
from benchmarks.zoo.shrinking import Config


def _derived_stages(**values: Any) -> Correction:
    """`values`, with the names of the stages left to the config class."""

    def correct(config: Config) -> Config:
        kept = {k: v for k, v in config.items() if k not in ("out_features", "out_indices", "stage_names")}
        return merge(kept, values)

    return correct


def _resnet_backbone(*features: str) -> Correction:
    """A small ResNet in the place of a backbone that another package would bring."""
    backbone = {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 64],
        "depths": [1, 1, 1, 1],
        "out_features": list(features),
    }
    return lambda config: {**config, "backbone": None, "use_timm_backbone": False, "backbone_config": backbone}


_SAM: Mapping[str, Any] = {
    "vision_config": {"num_pos_feats": 32, "output_channels": 64},
    "prompt_encoder_config": {"image_embedding_size": 4},
}
_SWIN: Mapping[str, Any] = {
    "embed_dim": 24,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "depths": [2, 2],
    "num_heads": [3, 6],
    "hidden_size": 48,
}

CONFIGS: dict[str, Correction] = {
    **dict.fromkeys(("beit", "dinov2", "dinov2_with_registers", "dinat"), _derived_stages()),
    **dict.fromkeys(("swin", "swinv2"), _derived_stages(**_SWIN, encoder_stride=4)),
    "donut-swin": _derived_stages(**_SWIN),
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), _resnet_backbone("stage4")),
    "deformable_detr": _resnet_backbone("stage2", "stage3", "stage4"),
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "swin2sr": {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 3]},
    **dict.fromkeys(("sam", "sam_hq"), _SAM),
    "levit": {"image_size": 224, "patch_size": 16},
    "imagegpt": {"vocab_size": 257},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "efficientnet": {"hidden_dim": 2560},
}


def packed_patches(draw: Draw, config: Any) -> Batch:
    """Images of different shapes as padded rows of patches (rows, patches, values), with mask and shapes."""
    shapes = torch.tensor(draw.pick([[4, 4], [2, 6]], [[4, 4], [2, 4], [2, 8]]))
    most = 16
    mask = torch.zeros(len(shapes), most, dtype=torch.long)
    for row, (height, width) in enumerate(shapes.tolist()):
        mask[row, : height * width] = 1
    values = getattr(config, "num_channels", 3) * config.patch_size**2
    return {
        "pixel_values": draw.normal(len(shapes), most, values),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def _large(draw: Draw) -> Batch:
    return {"inputs": draw.images(size=(224, 224))}


INPUTS: dict[str, Builder] = {
    "mobilevitv2": lambda draw: {"pixel_values": draw.images(size=(128, 128))},
    "imagegpt": lambda draw: {"input_ids": draw.ids(draw.rows, draw.pick(12, 17))},
    "Siglip2ForImageClassification": lambda draw: packed_patches(draw, draw.vision_config),
    "PerceiverForImageClassificationLearned": lambda draw: {"inputs": draw.images(size=image_size(draw.config))},
    "PerceiverForImageClassificationFourier": _large,
    "PerceiverForImageClassificationConvProcessing": _large,
}
