"""What inputs are drawn from, and the batches that most models take: text, images, sound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from benchmarks.zoo.architectures import Architecture
from benchmarks.zoo.configs import parts
from benchmarks.zoo.errors import NotBuilt
from benchmarks.zoo.shrinking import IMAGE_SIZE, TOKEN_KEY, VOCABULARY

Batch = dict[str, Any]
Padding = tuple[str, tuple[int, ...]]
"""The padded side and the padding of each row, in tokens."""

TEXT_PADDING: tuple[Padding, Padding] = (("left", (0, 3)), ("right", (0, 5, 2)))
DECODER_PADDING: tuple[Padding, Padding] = (("right", (0, 2)), ("right", (0, 0, 3)))


@dataclass
class Draw:
    """One batch to be drawn for one model: the first (2 rows) or the second (3 rows, other lengths and padding)."""

    architecture: Architecture
    model: nn.Module
    config: PretrainedConfig
    second: bool
    special: set[int] = field(default_factory=set)
    """Ids that random text must not hold."""

    def __post_init__(self) -> None:
        self.parameters = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        self.takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())
        self.generator = torch.Generator().manual_seed(1234 + self.second)
        self.rows: int = self.pick(2, 3)
        self.text_config = self.config.get_text_config()
        self.vision_config = getattr(self.config, "vision_config", None) or self.config
        size = getattr(self.text_config, "vocab_size", None) or getattr(self.config, "vocab_size", None)
        self.vocabulary = size if isinstance(size, int) else VOCABULARY
        for part in parts(self.config):
            for key, value in vars(part).items():
                if TOKEN_KEY.search(key):
                    values = value if isinstance(value, (list, tuple)) else [value]
                    self.special |= {token for token in values if isinstance(token, int)}
        padding = getattr(self.text_config, "pad_token_id", None)
        padding = getattr(self.config, "pad_token_id", None) if padding is None else padding
        self.padding = padding if isinstance(padding, int) and 0 <= padding < self.vocabulary else 0

    def pick(self, first: Any, second: Any) -> Any:
        """`first` for the first batch, `second` for the second."""
        return second if self.second else first

    def accepts(self, name: str) -> bool:
        """Whether the model's forward names an argument `name`."""
        return name in self.parameters

    def ids(self, *shape: int) -> torch.Tensor:
        """Random ordinary tokens (int64)."""
        ordinary = [i for i in range(min(self.vocabulary, VOCABULARY)) if i not in self.special and i > 3]
        choice = torch.tensor(ordinary or list(range(self.vocabulary)))
        return choice[torch.randint(0, len(choice), shape, generator=self.generator)]

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Random int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal float32."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform float32 in [0, 1)."""
        return torch.rand(*shape, generator=self.generator)

    def images(self, *lead: int, size: tuple[int, int] | None = None, channels: int = 3) -> torch.Tensor:
        """Random images (rows, *lead, channels, height, width), of the vision config's size."""
        return self.normal(self.rows, *lead, channels, *(size or image_size(self.vision_config)))


Builder = Callable[[Draw], Batch]


def text_batch(
    draw: Draw, lengths: tuple[int, int] = (12, 17), paddings: tuple[Padding, Padding] = TEXT_PADDING
) -> Batch:
    """`input_ids` and `attention_mask` (rows, length): padded on the left in the first batch, right in the second."""
    side, padding = paddings[draw.second]
    length = lengths[draw.second]
    ids = draw.ids(len(padding), length)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        where = slice(0, count) if side == "left" else slice(length - count, length)
        ids[row, where] = draw.padding
        mask[row, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoder_text(draw: Draw, mask: bool = True, lengths: tuple[int, int] = (7, 10)) -> Batch:
    """`decoder_input_ids`, and their mask where the model takes one."""
    text = text_batch(draw, lengths, DECODER_PADDING)
    batch = {"decoder_input_ids": text["input_ids"]}
    if mask and draw.accepts("decoder_attention_mask"):
        batch["decoder_attention_mask"] = text["attention_mask"]
    return batch


def padded_rows(draw: Draw, rows: Sequence[torch.Tensor]) -> Batch:
    """Rows of ids (tokens,) as one batch, padded to the longest: on the left first, on the right in the second."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), draw.padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if draw.second else slice(length - len(row), length)
        ids[index, where] = row
        mask[index, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def spliced_text(draw: Draw, counts: Sequence[int], token: int) -> Batch:
    """Text with `counts[row]` placeholder tokens in each row; the rows differ in length."""
    rows = []
    for row, count in enumerate(counts):
        before, after = (2, 6 + 2 * (row % 3)) if draw.second else (3, 4 + 3 * ((row + 1) % 2))
        rows.append(torch.cat([draw.ids(before), torch.full((count,), token), draw.ids(after)]))
    return padded_rows(draw, rows)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that `config` is for, in pixels."""
    for part in (config, getattr(config, "vision_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, (list, tuple)):
            return int(size[-2]), int(size[-1])
        if isinstance(size, int):
            return size, size
    return IMAGE_SIZE, IMAGE_SIZE


def channels_of(config: Any) -> int:
    """Colour channels."""
    found = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    return found if isinstance(found, int) else 3


def image_batch(draw: Draw) -> Batch:
    """`pixel_values` (rows, channels, height, width)."""
    return {"pixel_values": draw.images(size=image_size(draw.config), channels=channels_of(draw.config))}


def sound_batch(draw: Draw, lengths: tuple[int, int] = (1600, 2400)) -> Batch:
    """A waveform `input_values` (rows, samples), or a log-mel spectrogram `input_features` (rows, bins, frames)."""
    if draw.accepts("input_values"):
        length = lengths[draw.second]
        batch = {"input_values": draw.normal(draw.rows, length) * 0.5}
        if draw.accepts("attention_mask"):
            batch["attention_mask"] = right_padded_mask(draw, length, 400)
        return batch
    bins: int = getattr(draw.config, "num_mel_bins", None) or getattr(draw.config, "feature_size", None) or 80
    return {"input_features": draw.normal(draw.rows, bins, 2 * getattr(draw.config, "max_source_positions", 50))}


def right_padded_mask(draw: Draw, length: int, padding: int) -> torch.Tensor:
    """A mask (rows, length) whose second row ends in `padding` zeros."""
    mask = torch.ones(draw.rows, length, dtype=torch.long)
    mask[1, length - padding :] = 0
    return mask


def frames(bins: Callable[[Draw], int], lengths: tuple[int, int] = (40, 56), masked: bool = True) -> Builder:
    """A builder of `input_features` (rows, frames, bins), with a mask where the model takes one."""

    def build(draw: Draw) -> Batch:
        length = lengths[draw.second]
        batch = {"input_features": draw.normal(draw.rows, length, bins(draw))}
        if masked and draw.accepts("attention_mask"):
            batch["attention_mask"] = right_padded_mask(draw, length, 8)
        return batch

    return build


def with_decoder(build: Builder, mask: bool = True) -> Builder:
    """A builder that adds `decoder_input_ids` to what `build` makes."""
    return lambda draw: {**build(draw), **decoder_text(draw, mask)}


def first_row(batch: Mapping[str, Any], rows: int) -> Batch | None:
    """The first row of a batch; None where some value is not one to a row, or the row is padded."""
    row: Batch = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != rows:
            return None
        row[name] = value[:1].clone()
        if name.endswith("attention_mask") and not bool((row[name] == 1).all()):
            return None
    return row


def token_of(config: PretrainedConfig, keys: Sequence[str]) -> int:
    """The id of a placeholder token, from the first of `keys` that a part of the config has."""
    for part in parts(config):
        for key in keys:
            value = getattr(part, key, None)
            if isinstance(value, int):
                return value
    raise NotBuilt("inputs", f"no {keys[0]} in the config")
