"""From documents to calibration batches: tokenized, packed to equal length, chosen by a seed, with a fingerprint.

Where documents come from is the business of `fxcalib.sources`, how chats become tokens that of `fxcalib.chat`, images
and sound that of `fxcalib.multimodal`, whether a batch suits a model that of `fxcalib.batch_checks`; this module offers
their functions too.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fxcalib.batch_checks import LOSS_MASK, check_batch, fingerprint_batches
from fxcalib.chat import Chat, ChatTokenizer, Completion, Document, Tokens, chat_template, is_empty
from fxcalib.errors import BatchError, DataError, OptionError
from fxcalib.multimodal import MultimodalBatches, multimodal_batches
from fxcalib.sources import Stream, Texts, load_texts

__all__ = [
    "Batch",
    "CalibrationData",
    "Chat",
    "Completion",
    "MultimodalBatches",
    "Texts",
    "batches",
    "build",
    "check_batch",
    "fingerprint_batches",
    "load_batches",
    "load_texts",
    "multimodal_batches",
]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Tokenized samples, in the order in which calibration meets them."""

    samples: tuple[torch.Tensor, ...]
    """One (sequence,) int64 tensor per sample, without padding; all of one length where `packed`."""
    source: str
    fingerprint: str
    """sha256 over lengths and token ids of all samples, hexadecimal."""
    seed: int
    packed: bool
    pad_token_id: int
    padding_side: Literal["left", "right"]
    loss_masks: tuple[torch.Tensor, ...] | None = None
    """One (sequence,) bool tensor per sample, true where a token is completion; None where all tokens count."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples together, without padding."""
        return sum(len(sample) for sample in self.samples)

    def describe(self) -> dict[str, object]:
        """What identifies the data, as plain JSON values for a report."""
        described: dict[str, object] = {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": len(self.samples),
            "tokens": self.tokens,
            "packed": self.packed,
            "seed": self.seed,
        }
        if self.loss_masks is not None:
            described["completion_tokens"] = sum(int(mask.sum()) for mask in self.loss_masks)
        return described

    def __str__(self) -> str:
        lengths = sorted({len(sample) for sample in self.samples})
        shown = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return f"{len(self.samples)} samples of {shown} tokens from {self.source} ({self.fingerprint[:12]})"


def build(
    texts: Texts | Sequence[Document],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    pack: bool = True,
    at_most: bool = False,
    completion_only: bool = False,
) -> CalibrationData:
    """`samples` samples of `texts`, chosen by `seed`: the same arguments always give the same samples.

    Packed samples have exactly `seq_len` tokens: documents are shuffled and joined by the tokenizer's end of sequence
    until there is enough, the row of tokens is cut into windows, and the windows are drawn from. Without `pack`, each
    sample is one document with the tokenizer's special tokens, truncated to `seq_len` tokens. Chats are written by the
    chat template, with its special tokens and no others. With `at_most`, fewer samples than `samples` will do, but not
    none. With `completion_only`, samples have a loss mask and at least one token in it: of chats, what the assistant
    says, else the completion. `tokenizer` is a transformers tokenizer, or a processor that has one.

    Raises OptionError for a number below 1, and DataError for data that is empty or gives fewer samples than asked,
    for chats without a chat template, and for plain text where completions are asked for.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    source = texts.source if isinstance(texts, Texts) else "given texts"
    generator = random.Random(seed)
    documents = _shuffled(texts.documents if isinstance(texts, Texts) else texts, source, generator)
    tokenizer, template = _tokenizer(tokenizer), chat_template(tokenizer)
    encoder = _Encoder(ChatTokenizer(tokenizer, template, marked=completion_only), source, completion_only)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    asked = _Asked(samples, 1 if at_most else samples, seq_len, source)
    chosen = _windows(documents, encoder, end, asked, generator) if pack else _documents(documents, encoder, asked)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = tuple(torch.tensor(sample.ids, dtype=torch.int64) for sample in chosen)
    masks = tuple(torch.tensor(sample.completion, dtype=torch.bool) for sample in chosen) if completion_only else None
    return CalibrationData(
        samples=ids,
        source=source,
        fingerprint=_fingerprint([*ids, *(mask.long() for mask in masks or ())]),
        seed=seed,
        packed=pack,
        pad_token_id=0 if pad is None else int(pad),
        padding_side="left" if tokenizer.padding_side == "left" else "right",
        loss_masks=masks,
    )


def batches(data: CalibrationData, batch_size: int = 1) -> list[Batch]:
    """The samples in batches of `batch_size`, the last one possibly smaller.

    Packed samples come in order. Others are sorted by length, the longest first, so that there is little padding, and
    too little memory shows at once.

    Each is `{"input_ids": (batch, sequence) int64, "attention_mask": (batch, sequence) int64}`, padded to its longest
    sample on the tokenizer's side; the mask is 1 where a token is real. Where the data has loss masks, so have they:
    `loss_mask` (batch, sequence) int64. Raises OptionError for a size below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")
    order = list(range(len(data.samples)))
    if not data.packed:
        order.sort(key=lambda sample: -len(data.samples[sample]))
    return [_batch(data, order[first : first + batch_size]) for first in range(0, len(order), batch_size)]


def load_batches(path: str | Path) -> list[Mapping[str, Any]]:
    """Batches that `torch.save` wrote as a list of dicts of tensors; no code in the file is run.

    Raises BatchError for a file that cannot be read or holds something else.
    """
    advice = "save a list of dicts of tensors with torch.save"
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BatchError(f"batches file {str(path)!r} cannot be read: {reason}; {advice}") from error
    if not isinstance(held, list) or not held or not all(isinstance(batch, Mapping) for batch in held):
        kind = "an empty list" if held == [] else f"a {type(held).__name__}"
        raise BatchError(f"batches file {str(path)!r} holds {kind}, not a list of batches; {advice}")
    return held


@dataclass(frozen=True)
class _Asked:
    """How much is wanted of which data."""

    samples: int
    least: int
    seq_len: int
    source: str


@dataclass(frozen=True)
class _Encoder:
    """Tokens of documents, which know their completion where that is asked for."""

    tokenizer: ChatTokenizer
    source: str
    completion_only: bool

    def __call__(self, document: Document, *, special_tokens: bool) -> Tokens:
        tokens = self.tokenizer(document, special_tokens=special_tokens)
        if self.completion_only and tokens.completion is None:
            raise DataError(
                f"{self.source} holds plain text, in which nothing is completion; name a column of chats, or those of "
                "prompts and completions, or calibrate on all tokens"
            )
        return tokens


def _shuffled(documents: Sequence[Document] | Stream, source: str, generator: random.Random) -> Iterable[Document]:
    """Those that are not empty; a stream is shuffled already."""
    if isinstance(documents, Stream):
        return (document for document in documents if not is_empty(document))
    shuffled = [document for document in documents if not is_empty(document)]
    if not shuffled:
        raise DataError(f"{source} has no text: every document is empty; choose another source or column")
    generator.shuffle(shuffled)
    return shuffled


def _batch(data: CalibrationData, chosen: Sequence[int]) -> Batch:
    length = max(len(data.samples[sample]) for sample in chosen)
    columns = {
        "input_ids": (data.samples, data.pad_token_id),
        "attention_mask": ([torch.ones_like(sample) for sample in data.samples], 0),
    }
    if data.loss_masks is not None:
        columns[LOSS_MASK] = (data.loss_masks, 0)
    made: Batch = {}
    for key, (rows, padding) in columns.items():
        made[key] = torch.full((len(chosen), length), padding, dtype=torch.int64)
        for row, sample in enumerate(chosen):
            first = length - len(rows[sample]) if data.padding_side == "left" else 0
            made[key][row, first : first + len(rows[sample])] = rows[sample]
    return made


def _windows(
    documents: Iterable[Document], encoder: _Encoder, end: list[int], asked: _Asked, generator: random.Random
) -> list[Tokens]:
    """Windows of `seq_len` tokens, drawn from as many of the documents as are needed for them."""
    row: list[int] = []
    marks: list[bool] = []
    usable: list[Tokens] = []
    taken = 0
    for document in documents:
        ids, completion = encoder(document, special_tokens=False)
        after = [] if isinstance(document, Chat) else end  # the template has ended it
        row += ids + after
        marks += (completion or [True] * len(ids)) + [True] * len(after)
        while taken + asked.seq_len <= len(row):
            window = slice(taken, taken + asked.seq_len)
            if any(marks[window]):
                usable.append(Tokens(row[window], marks[window]))
            taken += asked.seq_len
        if len(usable) >= asked.samples:
            break
    count = len(usable)
    if count < asked.least:
        longest = len(row) // asked.least
        shorter = f"a sequence length of at most {longest}, " if 0 < longest < asked.seq_len else ""
        raise DataError(
            f"{asked.source} gives {count} samples of {asked.seq_len} tokens ({len(row)} tokens in all), fewer than "
            f"the {asked.least} asked for; use {_fewer(count)}{shorter}or more text"
        )
    return [usable[i] for i in generator.sample(range(count), min(asked.samples, count))]


def _documents(documents: Iterable[Document], encoder: _Encoder, asked: _Asked) -> list[Tokens]:
    """The first of the (shuffled) documents, each truncated to `seq_len` tokens; with completion there, if asked."""
    chosen: list[Tokens] = []
    for document in documents:
        ids, completion = encoder(document, special_tokens=True)
        marks = None if completion is None else completion[: asked.seq_len]
        if ids and (marks is None or any(marks)):
            chosen.append(Tokens(ids[: asked.seq_len], marks))
        if len(chosen) == asked.samples:
            break
    if len(chosen) < asked.least:
        within = f" with completion in the first {asked.seq_len} tokens" if encoder.completion_only else ""
        raise DataError(
            f"{asked.source} has {len(chosen)} documents{within}, fewer than the {asked.least} samples asked for; "
            f"use {_fewer(len(chosen))}more documents, or packed samples"
        )
    return chosen


def _fewer(count: int) -> str:
    return f"{count} sample{'s' * (count > 1)}, " if count else ""


def _tokenizer(tokenizer: Any) -> Any:
    found = getattr(tokenizer, "tokenizer", tokenizer)
    if found is None or not callable(found):
        raise DataError(
            "there is no tokenizer to turn text into tokens: the model came without one; "
            "pass a tokenizer, or batches that are tokenized already"
        )
    return found


def _fingerprint(samples: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(struct.pack("<q", len(sample)))
        digest.update(sample.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
