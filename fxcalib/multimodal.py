"""Batches of text with images or sound, made by a processor of transformers when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxcalib.chat import Message, chat_template, messages_of
from fxcalib.errors import DataError, OptionError

_CHATS = ("messages", "conversations")
_IMAGES = ("images", "image")
_AUDIO = ("audio", "audios")


@dataclass(frozen=True)
class Sample:
    """One row, as a processor takes it."""

    text: str
    images: tuple[Any, ...]
    audio: tuple[Any, ...]
    """Waveforms (time,) float."""
    sampling_rate: int | None
    """Of the waveforms, in Hz; None where the row does not say."""


@dataclass(frozen=True, eq=False)
class MultimodalBatches:
    """What `multimodal_batches` returns: each loop over it reads the rows and makes the batches anew."""

    rows: Sequence[Mapping[str, Any]]
    processor: Any
    order: tuple[int, ...]
    """Positions of the chosen rows."""
    batch_size: int
    dtype: torch.dtype | None = None
    _template: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_template", chat_template(self.processor))

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self.order), self.batch_size):
            yield self._batch(self.order[first : first + self.batch_size])

    def _batch(self, positions: Sequence[int]) -> dict[str, Any]:
        samples = [read_row(self.rows[i], i, self.processor, self._template) for i in positions]
        options: dict[str, Any] = {"text": [sample.text for sample in samples], "return_tensors": "pt", "padding": True}
        if any(sample.images for sample in samples):
            options["images"] = [list(sample.images) for sample in samples]
        if any(sample.audio for sample in samples):
            options["audio"] = [wave for sample in samples for wave in sample.audio]
            rates = {sample.sampling_rate for sample in samples if sample.sampling_rate is not None}
            if len(rates) > 1:
                raise DataError(f"{_rows(positions)} have the sampling rates {sorted(rates)}; resample them to one")
            if rates:
                options["sampling_rate"] = rates.pop()
        try:
            made = dict(self.processor(**options))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise DataError(
                f"{type(self.processor).__name__} refuses {_rows(positions)}: {error}; look at their text, which must "
                "hold a placeholder for each image and sound, and at what they hold of these"
            ) from error
        return {key: self._cast(value) for key, value in made.items()}

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if floating else value


def multimodal_batches(
    rows: Sequence[Mapping[str, Any]],
    processor: Any,
    *,
    batch_size: int = 1,
    samples: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> MultimodalBatches:
    """Batches of rows with images or sound, for `calibrate` or as `data` of `quantize`; lazy, for any number of loops.

    Args:
        rows: each with `messages` (or `conversations`), which the chat template writes, or `text`, which holds the
            processor's placeholders; and with `images` or `audio`, one or a list: what the processor takes, such as
            images of PIL, waveforms (time,) float, or `{"array": ..., "sampling_rate": ...}`. Messages without a part
            of type image or audio get theirs before the first text of the user. A dataset of `datasets` will do.
        processor: of transformers, which makes all tensors of a batch.
        batch_size: rows a batch; the last batch may be smaller.
        samples: how many rows to choose, by `seed`; default: all, in order.
        dtype: of floating-point tensors; default: as the processor makes them.

    Raises:
        OptionError: a number below 1.
        DataError: fewer rows than asked for; while looping, a row that holds no text or that the processor refuses,
            and messages without a chat template.
    """
    for name, value in (("batch_size", batch_size), ("samples", samples)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    order = list(range(len(rows)))
    if len(order) < (samples or 1):
        raise DataError(f"there are {len(order)} rows, fewer than the {samples or 1} asked for; give more rows")
    if samples is not None:
        order = random.Random(seed).sample(order, samples)
    return MultimodalBatches(rows, processor, tuple(order), batch_size, dtype)


def read_row(row: Mapping[str, Any], position: int, processor: Any, template: str | None) -> Sample:
    """A row as `processor` takes it; `position` names it in messages, `template` writes its messages.

    Raises:
        DataError: it holds neither messages nor text, or messages that cannot be written.
    """
    images, audio = _several(row, _IMAGES), _several(row, _AUDIO)
    waves = tuple(each["array"] if isinstance(each, Mapping) else each for each in audio)
    rates = {int(each["sampling_rate"]) for each in audio if isinstance(each, Mapping) and each.get("sampling_rate")}
    if len(rates) > 1:
        raise DataError(f"row {position} has sounds of the sampling rates {sorted(rates)}; resample them to one")
    chat = next((row[key] for key in _CHATS if row.get(key) is not None), None)
    if chat is not None:
        text = _written(messages_of(chat, f"row {position}"), len(images), len(audio), position, processor, template)
    elif isinstance(row.get("text"), str):
        text = row["text"]
    else:
        raise DataError(f"row {position} has neither 'messages' nor 'text'; its keys are {', '.join(map(repr, row))}")
    return Sample(text, images, waves, next(iter(rates), None))


def _several(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    value = next((row[key] for key in keys if row.get(key) is not None), ())
    return tuple(value) if isinstance(value, (list, tuple)) and not _is_wave(value) else (value,)


def _is_wave(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], (int, float))


def _written(
    messages: Sequence[Message], images: int, audio: int, position: int, processor: Any, template: str | None
) -> str:
    from jinja2.exceptions import TemplateError

    if template is None:
        raise DataError(
            f"row {position} holds messages, but {type(processor).__name__} has no chat template to write them: "
            "set processor.chat_template, or give rows with 'text'"
        )
    chat = _with_media(messages, images, audio)
    try:
        return str(processor.apply_chat_template(chat, chat_template=template, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the chat template of {type(processor).__name__} refuses row {position}: {error}; leave it out, or set a "
            "template that takes it"
        ) from error


def _with_media(messages: Sequence[Message], images: int, audio: int) -> list[dict[str, Any]]:
    """`messages` with content in parts, and a part for each image and sound where they name none."""
    chat = [{**message, "content": _parts(message.get("content"))} for message in messages]
    named = {part.get("type") for message in chat for part in message["content"]}
    media = [{"type": kind} for kind, count in (("image", images), ("audio", audio)) for _ in range(count)]
    missing = [part for part in media if part["type"] not in named]
    first = next((message for message in chat if message.get("role") == "user"), None)
    if first is not None:
        first["content"] = [*missing, *first["content"]]
    return chat


def _parts(content: object) -> list[dict[str, Any]]:
    if isinstance(content, (list, tuple)):  # tables fill in None for the keys that a part lacks
        return [{key: value for key, value in part.items() if value is not None} for part in content]
    return [{"type": "text", "text": "" if content is None else str(content)}]


def _rows(positions: Sequence[int]) -> str:
    return f"row {positions[0]}" if len(positions) == 1 else f"rows {', '.join(map(str, positions))}"
