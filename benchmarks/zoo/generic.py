"""The batch of a model that needs nothing special: from its category and what its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from benchmarks.zoo.errors import NotBuilt
from benchmarks.zoo.inputs import (
    Batch,
    Draw,
    channels_of,
    decoder_text,
    image_batch,
    image_size,
    sound_batch,
    text_batch,
)
from benchmarks.zoo.multimodal import IMAGE_TOKEN_KEYS, image_language
from benchmarks.zoo.shrinking import IMAGE_SIZE

SOUND = frozenset({"audio_cls", "ctc", "audio_frame_cls", "audio_xvector"})
LANGUAGE = frozenset({"causal_lm", "seq2seq", "masked_lm", "text_cls", "token_cls", "question_answering"})
SEEING = frozenset({"image_text_to_text", "multimodal", "retrieval"})
CHOICES = 2


def usual_batch(draw: Draw) -> Batch:
    """The batch of `draw` for a model without an input builder of its own.

    Raises:
        NotBuilt: its forward requires arguments of an unknown kind.
    """
    category = draw.architecture.category
    main = getattr(draw.model, "main_input_name", "input_ids")
    sees = draw.accepts("pixel_values") and hasattr(draw.model, "get_image_features")
    if category == "image_cls":
        return image_batch(draw)
    if category in SOUND:
        return sound_batch(draw, (8000, 10000)) if category == "audio_xvector" else sound_batch(draw)
    if category == "speech_seq2seq" or (category == "seq2seq" and main != "input_ids"):
        decoder = decoder_text(draw, False, (9, 13)) if draw.accepts("decoder_input_ids") else {}
        return {**sound_batch(draw), **decoder}
    if category in SEEING or (category in LANGUAGE and sees and _has_image_token(draw)):
        return image_language(draw)
    if category in LANGUAGE and draw.accepts("input_ids"):
        decoder = decoder_text(draw) if draw.accepts("decoder_input_ids") and category != "causal_lm" else {}
        return {**_text(draw), **decoder}
    if category == "multiple_choice":
        return _choices(draw)
    return by_signature(draw)


def by_signature(draw: Draw) -> Batch:
    """A value for each kind of input that the forward names, images and text together where it takes both."""
    main = getattr(draw.model, "main_input_name", "input_ids")
    if draw.accepts("input_ids") and draw.accepts("pixel_values") and _has_image_token(draw):
        return image_language(draw)
    batch: Batch = {}
    if draw.accepts("input_ids"):
        batch.update(_text(draw))
    if draw.accepts("pixel_values"):
        batch["pixel_values"] = _pixels(draw)
    elif draw.accepts("pixel_values_videos"):
        batch["pixel_values_videos"] = _video(draw)
    if (draw.accepts("input_values") or draw.accepts("input_features")) and main != "input_ids":
        batch.update(sound_batch(draw))
    if draw.accepts("decoder_input_ids") and draw.config.is_encoder_decoder:
        batch.update(decoder_text(draw))
    if draw.accepts("task_inputs"):
        batch["task_inputs"] = draw.ids(draw.rows, 7)
    if draw.accepts("input_points") and draw.architecture.category == "mask_generation":
        batch["input_points"] = draw.uniform(draw.rows, 1, 1, 2) * IMAGE_SIZE
    if draw.accepts("past_values"):
        batch.update(_series(draw))
    required = [
        name
        for name, parameter in draw.parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in ("self", *batch)
    ]
    if required or not batch:
        raise NotBuilt("inputs", f"its forward requires {', '.join(required) or 'nothing known'}")
    return batch


def _has_image_token(draw: Draw) -> bool:
    return any(isinstance(getattr(draw.config, key, None), int) for key in IMAGE_TOKEN_KEYS)


def _text(draw: Draw) -> Batch:
    longest = getattr(draw.text_config, "max_position_embeddings", None)
    short = isinstance(longest, int) and longest < 20
    batch = text_batch(draw, (9, 14)) if short else text_batch(draw)
    if not draw.accepts("attention_mask") and not draw.takes_any:
        del batch["attention_mask"]
    return batch


def _choices(draw: Draw) -> Batch:
    batch = text_batch(draw)
    return {name: value[:, None].expand(-1, CHOICES, -1).contiguous() for name, value in batch.items()}


def _pixels(draw: Draw) -> torch.Tensor:
    size, channels = image_size(draw.vision_config), channels_of(draw.vision_config)
    frames = getattr(draw.vision_config, "num_frames", None)
    if draw.architecture.category == "text_recognition":
        return draw.images(size=(48, 320), channels=channels)
    if draw.architecture.category == "keypoint_matching":
        return draw.images(2, size=size, channels=channels)
    if isinstance(frames, int) and draw.architecture.category in ("video_cls", "pretraining", "base"):
        return draw.images(frames, size=size, channels=channels)
    return draw.images(size=size, channels=channels)


def _video(draw: Draw) -> torch.Tensor:
    config: Any = draw.vision_config
    frames = getattr(config, "frames_per_clip", None) or getattr(config, "num_frames", None) or 4
    side = getattr(config, "crop_size", None) or image_size(config)[0]
    return draw.images(frames, size=(side, side), channels=channels_of(config))


def _series(draw: Draw) -> Batch:
    config: Any = draw.config
    length = getattr(config, "context_length", None) or 16
    channels = getattr(config, "num_input_channels", None)
    if not draw.accepts("past_time_features"):
        return {"past_values": draw.normal(draw.rows, length, *([channels] if channels else []))}
    past = length + max(config.lags_sequence)
    values = draw.normal(draw.rows, past, *([config.input_size] if config.input_size > 1 else []))
    return {
        "past_values": values,
        "past_observed_mask": torch.ones_like(values),
        "past_time_features": draw.normal(draw.rows, past, config.num_time_features),
        "future_time_features": draw.normal(draw.rows, config.prediction_length, config.num_time_features),
        "future_values": draw.normal(draw.rows, config.prediction_length, *values.shape[2:]),
    }
