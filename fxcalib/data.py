"""From texts to calibration batches: tokenized, packed to equal length, chosen by a seed, with a fingerprint.

Where texts come from is the business of `fxcalib.sources`, whether a batch suits a model that of
`fxcalib.batch_checks`; this module offers their functions too.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fxcalib.batch_checks import check_batch, fingerprint_batches
from fxcalib.errors import DataError, OptionError
from fxcalib.sources import Texts, load_texts

__all__ = ["Batch", "CalibrationData", "Texts", "batches", "build", "check_batch", "fingerprint_batches", "load_texts"]

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

    @property
    def tokens(self) -> int:
        """Tokens of all samples together, without padding."""
        return sum(len(sample) for sample in self.samples)

    def describe(self) -> dict[str, object]:
        """What identifies the data, as plain JSON values for a report."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": len(self.samples),
            "tokens": self.tokens,
            "packed": self.packed,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        lengths = sorted({len(sample) for sample in self.samples})
        shown = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return f"{len(self.samples)} samples of {shown} tokens from {self.source} ({self.fingerprint[:12]})"


def build(
    texts: Texts | Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    pack: bool = True,
    at_most: bool = False,
) -> CalibrationData:
    """`samples` samples of `texts`, chosen by `seed`: the same arguments always give the same samples.

    Packed samples have exactly `seq_len` tokens: documents are shuffled and joined by the tokenizer's end of sequence
    until there is enough, the row of tokens is cut into windows, and the windows are drawn from. Without `pack`, each
    sample is one document with the tokenizer's special tokens, truncated to `seq_len` tokens. With `at_most`, fewer
    samples than `samples` will do, but not none. `tokenizer` is a transformers tokenizer, or a processor that has one.

    Raises OptionError for a number below 1, and DataError for data that is empty or gives fewer samples than asked.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    source = texts.source if isinstance(texts, Texts) else "given texts"
    documents = [text for text in (texts.documents if isinstance(texts, Texts) else texts) if text.strip()]
    if not documents:
        raise DataError(f"{source} has no text: every document is empty; choose another source or column")
    tokenizer = _tokenizer(tokenizer)
    generator = random.Random(seed)
    generator.shuffle(documents)
    draw = _windows if pack else _documents
    chosen = draw(documents, tokenizer, samples, 1 if at_most else samples, seq_len, source, generator)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return CalibrationData(
        samples=chosen,
        source=source,
        fingerprint=_fingerprint(chosen),
        seed=seed,
        packed=pack,
        pad_token_id=0 if pad is None else int(pad),
        padding_side="left" if tokenizer.padding_side == "left" else "right",
    )


def batches(data: CalibrationData, batch_size: int = 1) -> list[Batch]:
    """The samples in batches of `batch_size`, the last one possibly smaller, in order.

    Each is `{"input_ids": (batch, sequence) int64, "attention_mask": (batch, sequence) int64}`, padded to its longest
    sample on the tokenizer's side; the mask is 1 where a token is real. Raises OptionError for a size below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")
    groups = [data.samples[first : first + batch_size] for first in range(0, len(data.samples), batch_size)]
    return [_batch(group, data.pad_token_id, data.padding_side) for group in groups]


def _batch(samples: Sequence[torch.Tensor], pad_token_id: int, padding_side: Literal["left", "right"]) -> Batch:
    length = max(len(sample) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        first = length - len(sample) if padding_side == "left" else 0
        input_ids[row, first : first + len(sample)] = sample
        attention_mask[row, first : first + len(sample)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _windows(
    documents: Sequence[str],
    tokenizer: Any,
    samples: int,
    least: int,
    seq_len: int,
    source: str,
    generator: random.Random,
) -> tuple[torch.Tensor, ...]:
    """`samples` windows of `seq_len` tokens, drawn from as many of the documents as are needed for them."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    row: list[int] = []
    for document in documents:
        row += tokenizer(document, add_special_tokens=False, verbose=False).input_ids + end
        if len(row) >= samples * seq_len:
            break
    count = len(row) // seq_len
    if count < least:
        shorter = f"a sequence length of at most {len(row) // least}, " if len(row) >= least else ""
        raise DataError(
            f"{source} gives {count} samples of {seq_len} tokens ({len(row)} tokens in all), fewer than the {least} "
            f"asked for; use {_fewer(count)}{shorter}or more text"
        )
    chosen = generator.sample(range(count), min(samples, count))
    return tuple(torch.tensor(row[i * seq_len : (i + 1) * seq_len], dtype=torch.int64) for i in chosen)


def _documents(
    documents: Sequence[str], tokenizer: Any, samples: int, least: int, seq_len: int, source: str, _: random.Random
) -> tuple[torch.Tensor, ...]:
    """The first `samples` of the (shuffled) documents, each truncated to `seq_len` tokens."""
    if len(documents) < least:
        raise DataError(
            f"{source} has {len(documents)} documents, fewer than the {least} samples asked for; "
            f"use {_fewer(len(documents))}more documents, or packed samples"
        )
    encoded = (tokenizer(document, verbose=False).input_ids[:seq_len] for document in documents[:samples])
    return tuple(torch.tensor(ids, dtype=torch.int64) for ids in encoded)


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
