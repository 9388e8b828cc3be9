"""A batch to trace a model with when no data is at hand: real shapes, made-up values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxcalib.caches import without_cache
from fxcalib.errors import BatchError

IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")
DEFAULT_LENGTH = 2048


def sample_batch(model: nn.Module, *, batch: int = 1, sequence: int | None = None) -> dict[str, Any]:
    """Keyword arguments for the forward of a transformers model, read from its config and signature.

    Text models get `input_ids` and `attention_mask` (batch, sequence) int64 without padding, encoder-decoders also
    `decoder_input_ids`, speech models `input_features` (batch, mel bins, frames) or `input_values` (batch, samples),
    vision-language models one image a row with its tokens in the text. `sequence` is cut to what the model has
    positions for; default: 2048.

    Raises:
        BatchError: the model's inputs are of a kind that this cannot make.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise BatchError(f"{type(model).__name__} has no transformers config to make a sample batch from; give --batch")
    return _Sampler(model, config, batch, sequence or DEFAULT_LENGTH).make()


class _Sampler:
    def __init__(self, model: nn.Module, config: PreTrainedConfig, rows: int, length: int) -> None:
        self._model, self._config, self._rows = model, config, rows
        self._accepts = set(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
        self._length = min(length, _first(config, "max_position_embeddings", "max_target_positions") or length)
        self._random = torch.Generator().manual_seed(0)

    def make(self) -> dict[str, Any]:
        main = str(getattr(self._model, "main_input_name", "input_ids"))
        makers = {
            "input_ids": self._text,
            "input_features": self._features,
            "input_values": self._waveform,
            "pixel_values": self._image,
        }
        if main not in makers:
            raise BatchError(
                f"the main input of {type(self._model).__name__} is {main!r}, which no sample can be made for; "
                "save a batch with torch.save and give it with --batch"
            )
        batch = makers[main]()
        if main == "pixel_values" and "input_ids" in self._accepts:
            batch |= self._text()
        if "decoder_input_ids" in self._accepts and getattr(self._config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = self._ids(self._length)
        return dict(without_cache(self._model, batch))

    def _text(self) -> dict[str, Any]:
        token = _first(self._config, *IMAGE_TOKENS)
        marked = hasattr(self._model, "get_image_features") or hasattr(self._model, "model")
        if "pixel_values" in self._accepts and token is not None and marked:
            return self._text_with_image(token)
        ids = self._ids(self._length)
        batch = {"input_ids": ids}
        if "attention_mask" in self._accepts:
            batch["attention_mask"] = torch.ones_like(ids)
        if "pixel_values" in self._accepts and hasattr(self._config, "vision_config"):
            batch |= self._image()
        return batch

    def _ids(self, length: int) -> torch.Tensor:
        vocabulary = _first(self._config, "vocab_size") or 2
        special = {v for c in _configs(self._config) for k, v in vars(c).items() if "token" in k and type(v) is int}
        usable = [i for i in range(min(vocabulary, 1000)) if i not in special] or list(range(vocabulary))
        chosen = torch.randint(len(usable), (self._rows, length), generator=self._random)
        return torch.tensor(usable)[chosen]

    def _text_with_image(self, token: int) -> dict[str, Any]:
        image = self._image()
        count = self._image_tokens(image)
        ids = self._ids(max(self._length, count + 8))
        ids[:, 4 : 4 + count] = token
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._accepts:
                batch[name] = (ids == token).long()
                break
        return batch

    def _image_tokens(self, image: dict[str, torch.Tensor]) -> int:
        """How many positions of the text one image takes."""
        vision = getattr(self._config, "vision_config", self._config)
        if "image_grid_thw" in image:
            return int(image["image_grid_thw"][0].prod()) // (_first(vision, "spatial_merge_size") or 2) ** 2
        inner = self._model if hasattr(self._model, "get_image_features") else getattr(self._model, "model", None)
        if inner is None or not hasattr(inner, "get_image_features"):
            return _first(self._config, "image_seq_length", "num_image_tokens") or 1
        device = next(self._model.parameters()).device
        look: Any = inner.get_image_features
        with torch.no_grad():
            features = look(**{name: value.to(device) for name, value in image.items()})
        return sum(t.numel() // t.shape[-1] for t in _tensors(features)) // self._rows

    def _image(self) -> dict[str, Any]:
        vision = getattr(self._config, "vision_config", None) or self._config
        channels = _first(vision, "num_channels", "in_channels", "in_chans") or 3
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        if "image_grid_thw" in self._accepts:
            patch, frames = _first(vision, "patch_size") or 14, _first(vision, "temporal_patch_size") or 1
            grid = torch.tensor([[1, 16, 16]] * self._rows)
            patches = self._noise(int(grid.prod(1).sum()), channels * frames * patch * patch)
            return {"pixel_values": patches.to(dtype), "image_grid_thw": grid}
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": self._noise(self._rows, channels, height, width).to(dtype)}

    def _features(self) -> dict[str, Any]:
        bins = _first(self._config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
        frames = 2 * (_first(self._config, "max_source_positions") or 1500)
        dtype = next(self._model.parameters()).dtype
        return {"input_features": self._noise(self._rows, bins, frames).to(dtype)}

    def _waveform(self) -> dict[str, Any]:
        return {"input_values": self._noise(self._rows, 16000).to(next(self._model.parameters()).dtype)}

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these whole numbers that the config or one of its parts holds."""
    for part in (config, config.get_text_config(), *_configs(config)):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _tensors(features: object) -> list[torch.Tensor]:
    """Image features among what `get_image_features` returns: tensors, lists of them, or an output object."""
    if isinstance(features, torch.Tensor):
        return [features]
    pooled = getattr(features, "pooler_output", None)
    if pooled is None:
        pooled = getattr(features, "last_hidden_state", None)
    if pooled is not None:
        return _tensors(pooled)
    return [t for item in features for t in _tensors(item)] if isinstance(features, (list, tuple)) else []
