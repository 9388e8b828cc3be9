"""Batches of models that put images or sound between text: as many placeholder tokens as the model has features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.zoo.errors import NotBuilt
from benchmarks.zoo.inputs import Batch, Builder, Draw, channels_of, image_size, spliced_text, token_of

IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id")
AUDIO_TOKEN_KEYS = ("audio_token_id", "audio_token_index")
FIRST_GRID, SECOND_GRID = [[1, 4, 4], [1, 4, 4]], [[1, 4, 4], [1, 4, 6], [1, 8, 4]]
"""Frames, patch rows and patch columns of each image."""

Counts = Callable[[Draw, Batch], Sequence[int]]
"""Placeholder tokens of each row, given the features' inputs."""


def image_token(draw: Draw) -> int:
    """The placeholder that image features take the place of."""
    return token_of(draw.config, IMAGE_TOKEN_KEYS)


def vision_language(make: Builder, counts: Counts | None = None, token: Callable[[Draw], int] = image_token) -> Builder:
    """A builder of text with the images that `make` draws.

    `counts` says how many placeholders each row has; by default the model is asked for its image features.
    """

    def build(draw: Draw) -> Batch:
        images = make(draw)
        placeholder = token(draw)
        draw.special.add(placeholder)
        needed = counts(draw, images) if counts else feature_counts(draw, ["get_image_features"], images)
        batch = spliced_text(draw, needed, placeholder)
        tensors = {name: value for name, value in images.items() if isinstance(value, torch.Tensor)}
        batch.update({name: value for name, value in tensors.items() if draw.accepts(name) or draw.takes_any})
        return with_types(draw, batch, placeholder)

    return build


def audio_language(make: Builder) -> Builder:
    """A builder of text with the sound that `make` draws; the model is asked how many features it gives."""

    def build(draw: Draw) -> Batch:
        sound = make(draw)
        counts = feature_counts(draw, ["get_audio_features", "get_audio_embeds"], sound)
        return {**spliced_text(draw, counts, token_of(draw.config, AUDIO_TOKEN_KEYS)), **sound}

    return build


def with_types(draw: Draw, batch: Batch, placeholder: int) -> Batch:
    """`batch` with the token types that multimodal models take: 1 where an image lies."""
    types = (batch["input_ids"] == placeholder).long()
    for name in ("mm_token_type_ids", "token_type_ids"):
        if draw.accepts(name):
            return {**batch, name: types}
    return batch


def image_language(draw: Draw) -> Batch:
    """The usual batch of a vision-language model: one image in each row, as pixels or as patches with a grid."""
    config: Any = draw.vision_config
    images = patches(draw) if draw.accepts("image_grid_thw") else {"pixel_values": plain_images(draw)}
    return vision_language(lambda _: images, None if "image_grid_thw" not in images else _by_grid(config))(draw)


def plain_images(draw: Draw) -> torch.Tensor:
    """Pixels (rows, channels, height, width) of the vision config's size."""
    return draw.images(size=image_size(draw.vision_config), channels=channels_of(draw.vision_config))


def grid(draw: Draw) -> torch.Tensor:
    """Sizes of the images in patches, (images, 3): all alike in the first batch, different in the second."""
    return torch.tensor(draw.pick(FIRST_GRID, SECOND_GRID))


def patches(draw: Draw, temporal: int | None = None, channels: int | None = None) -> Batch:
    """Flattened patches (patches, values) of all images and the grid of each."""
    config: Any = draw.vision_config
    sizes = grid(draw)
    depth = temporal or getattr(config, "temporal_patch_size", 1) or 1
    colours = channels or getattr(config, "in_channels", None) or getattr(config, "num_channels", None)
    values = (colours if isinstance(colours, int) else 3) * depth * config.patch_size**2
    return {"pixel_values": draw.normal(int(sizes.prod(1).sum()), values), "image_grid_thw": sizes}


def merged_patches(merged: int) -> Counts:
    """One placeholder for `merged` patches."""
    return lambda draw, images: [int(size.prod()) // merged for size in images["image_grid_thw"]]


def _by_grid(config: Any) -> Counts:
    merged = getattr(config, "spatial_merge_size", 2) ** 2

    def count(draw: Draw, images: Batch) -> Sequence[int]:
        sizes = images["image_grid_thw"].prod(1).tolist()
        total = _vectors(_features(_ask(draw, ["get_image_features"], images)))
        expected = [size // merged for size in sizes]
        return expected if sum(expected) == total else [size * total // sum(sizes) for size in sizes]

    return count


def feature_counts(draw: Draw, methods: Sequence[str], inputs: Batch) -> list[int]:
    """Features of each row as the model's own method gives them."""
    features = _features(_ask(draw, methods, inputs))
    while isinstance(features, (list, tuple)) and len(features) == 1 and draw.rows > 1:
        features = features[0]
    if isinstance(features, (list, tuple)):
        if isinstance(features[0], (list, tuple)):
            features = features[0]
        each = [_vectors(item) for item in features]
        if len(each) == draw.rows:
            return each
    return [_vectors(features) // draw.rows] * draw.rows


def _ask(draw: Draw, methods: Sequence[str], inputs: Batch) -> Any:
    owners = [draw.model, getattr(draw.model, "model", None)]
    method = next((getattr(o, name) for o in owners if o is not None for name in methods if hasattr(o, name)), None)
    if method is None:
        raise NotBuilt("inputs", f"the model has no {methods[0]}")
    taken = inspect.signature(inspect.unwrap(method)).parameters
    with torch.no_grad():
        try:
            return method(**{name: value for name, value in inputs.items() if name in taken or name == "pixel_values"})
        except TypeError as error:  # a decorator hides the signature
            if "required positional" not in str(error) and "unexpected keyword" not in str(error):
                raise
        try:
            return method(**inputs)
        except TypeError:
            return method(next(iter(inputs.values())))


def _features(output: Any) -> Any:
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if getattr(output, "deepstack_features", None):
        return output.deepstack_features[0][1]
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], (list, tuple)):
        return output[0]
    return output


def _vectors(features: Any) -> int:
    if isinstance(features, (list, tuple)):
        return sum(_vectors(item) for item in features)
    return int(features.numel() // features.shape[-1])
