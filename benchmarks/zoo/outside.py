"""Models that are defined outside of transformers: loaded as remote code, or without any config."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks.zoo import plain
from benchmarks.zoo.inputs import Batch, Builder, Draw, text_batch
from benchmarks.zoo.multimodal import vision_language

REMOTE_MODELS: Mapping[str, str] = {
    "parrot": "ParrotForCausalLM",
    "owl": "OwlForCausalLM",
    "heron": "HeronModel",
    "kingfisher": "KingfisherForCausalLM",
}
"""Model type -> class; each is the file `remote/modeling_TYPE.py`, which a checkpoint would bring along."""


def _sight(draw: Draw) -> Batch:
    return {"pixel_values": draw.images(size=(32, 32))}


REMOTE_INPUTS: Mapping[str, Builder] = {
    "parrot": text_batch,
    "owl": text_batch,
    "heron": text_batch,
    "kingfisher": vision_language(_sight, lambda draw, images: [16] * draw.rows),
}


def remote_model(model_type: str, attention: str) -> nn.Module:
    """The model of `remote/modeling_TYPE.py` as transformers loads it from a checkpoint that brings its own code."""
    class_name = REMOTE_MODELS[model_type]
    auto: Any = AutoModelForCausalLM if class_name.endswith("ForCausalLM") else AutoModel
    source = Path(__file__).parent / "remote" / f"modeling_{model_type}.py"
    with tempfile.TemporaryDirectory(prefix=f"{model_type}_") as made:
        folder = Path(made)
        (folder / source.name).write_text(source.read_text())
        auto_map = {
            "AutoConfig": f"{source.stem}.{class_name.partition('For')[0].removesuffix('Model')}Config",
            auto.__name__: f"{source.stem}.{class_name}",
        }
        config = {"model_type": f"remote_{model_type}", "architectures": [class_name], "auto_map": auto_map}
        (folder / "config.json").write_text(json.dumps(config))
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model: nn.Module = auto.from_config(
            loaded, trust_remote_code=True, dtype=torch.float32, attn_implementation=attention
        )
    return model


@dataclass(frozen=True)
class PlainModel:
    """A module without a config, and its batches."""

    make: Callable[[], nn.Module]
    batch: Callable[[bool], Batch]
    """Given whether it is the second batch, of other sizes."""


def _images(second: bool) -> Batch:
    generator = torch.Generator().manual_seed(99 + second)
    rows, height, width = (3, 48, 64) if second else (2, 32, 32)
    return {"image": torch.randn(rows, 3, height, width, generator=generator)}


def _square_images(second: bool) -> Batch:
    generator = torch.Generator().manual_seed(99 + second)
    return {"image": torch.randn(3 if second else 2, 3, 32, 32, generator=generator)}


def _diffused(second: bool) -> Batch:
    return {**_images(second), "time": torch.tensor([3, 41, 500][: 3 if second else 2])}


def _tokens(second: bool) -> Batch:
    generator = torch.Generator().manual_seed(99 + second)
    return {"tokens": torch.randint(0, 64, (3, 15) if second else (2, 9), generator=generator)}


PLAIN_MODELS: Mapping[str, PlainModel] = {
    "ResNet": PlainModel(plain.ResNet, _images),
    "VisionTransformer": PlainModel(plain.VisionTransformer, _square_images),
    "UNet": PlainModel(plain.UNet, _diffused),
    "MixtureOfExperts": PlainModel(plain.MixtureOfExperts, _tokens),
}
