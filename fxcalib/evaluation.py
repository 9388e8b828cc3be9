"""How good a compressed model is: its perplexity on text, and how far its predictions are from a reference model's."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcalib.batch_checks import check_batch
from fxcalib.data import build
from fxcalib.errors import ModelError, OptionError
from fxcalib.progress import Progress
from fxcalib.sources import load_texts

DEFAULT_SAMPLES = 64
DEFAULT_SEQ_LEN = 512

CHUNK_VALUES = 1 << 24
"""Logits that are held in float32 at once, 64 MiB for each model: bounds the memory of large vocabularies."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out text, alone and beside a reference."""

    perplexity: float
    """exp of the mean negative log-likelihood in nats of each token after the first of its window."""
    kl: float | None
    """Mean over all tokens of KL(reference || model) in nats; None without a reference."""
    reference_perplexity: float | None
    tokens: int
    """Tokens that were evaluated, each counted once."""
    seconds: float
    source: str
    """Where the text is from."""

    def __str__(self) -> str:
        text = f"perplexity {self.perplexity:.3f}"
        if self.kl is not None and self.reference_perplexity is not None:
            text += f" (reference {self.reference_perplexity:.3f}), KL to the reference {self.kl:.4f} nats per token"
        return f"{text}, over {self.tokens:,} tokens of {self.source} in {self.seconds:.1f} s"


@dataclass
class _Sums:
    """Sums over tokens, in float64 nats."""

    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0


def perplexity(
    model: nn.Module, windows: torch.Tensor, *, batch_size: int = 1, progress: Progress | None = None
) -> float:
    """Perplexity of a causal language model on `windows`, (window, sequence) int64 token ids without padding.

    Each token after the first of its window is predicted from those before it in the window. The model runs as it is,
    in evaluation mode; losses are summed in float64. Raises OptionError for windows of another shape, and BatchError.
    """
    _check_windows(windows, batch_size)
    sums = _sweep(model, None, windows, batch_size, progress)
    return _exp(sums.loss / _predicted(windows))


def kl_divergence(
    model: nn.Module,
    reference: nn.Module,
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> float:
    """Mean over all tokens of `windows`, (window, sequence) int64, of KL(reference || model) in nats.

    Computed in float32 from the logits of both models, chunk by chunk, and summed in float64. Raises ModelError where
    the models have vocabularies of different size, OptionError for windows of another shape, and BatchError.
    """
    _check_windows(windows, batch_size)
    return _sweep(model, reference, windows, batch_size, progress).divergence / windows.numel()


def evaluate(
    model: nn.Module | str | Path,
    reference: nn.Module | str | Path | None = None,
    data: str | Path | torch.Tensor | None = None,
    *,
    tokenizer: Any = None,
    text_column: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` and, with a `reference`, the KL divergence to it, in one pass over the data.

    A model is a module, which stays where it is, or a checkpoint folder or hub id, quantized or not, which is loaded
    to `device` (the CPU by default). `data` is a source for `load_texts` of which `samples` windows of `seq_len` tokens
    are drawn by `seed` (by default as many as there are, up to 64, of 512 tokens or what the model can take), or
    windows, (window, sequence) int64; without `data`, the held-out part of the built-in text.
    `tokenizer` is that of the model's checkpoint unless given.

    Raises ModelError for a folder that is no checkpoint and for models whose vocabularies differ, OptionError for
    texts without a tokenizer, DataError for texts that cannot be read or are too short, and BatchError for token ids
    that the model does not know.
    """
    progress = Progress() if progress is None else progress
    progress.phase("load")
    own, own_tokenizer = _load(model, device)
    other, other_tokenizer = (None, None) if reference is None else _load(reference, device)
    _check_vocabularies(own_tokenizer, other_tokenizer)
    if isinstance(data, torch.Tensor):
        windows, source = data, "given windows"
    else:
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
        tokenizer = other_tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise OptionError("a model object alone cannot be evaluated on text: pass tokenizer=, or windows as data=")
        texts = load_texts(data, column=text_column, builtin="heldout")
        count = DEFAULT_SAMPLES if samples is None else samples
        limit = getattr(getattr(own, "config", None), "max_position_embeddings", None) or DEFAULT_SEQ_LEN
        length = min(DEFAULT_SEQ_LEN, limit) if seq_len is None else seq_len
        drawn = build(texts, tokenizer, samples=count, seq_len=length, seed=seed, at_most=samples is None)
        windows, source = torch.stack(drawn.samples), drawn.source
    _check_windows(windows, batch_size)
    progress.phase("evaluate")
    started = time.perf_counter()
    sums = _sweep(own, other, windows, batch_size, progress)
    return Evaluation(
        perplexity=_exp(sums.loss / _predicted(windows)),
        kl=None if other is None else sums.divergence / windows.numel(),
        reference_perplexity=None if other is None else _exp(sums.reference_loss / _predicted(windows)),
        tokens=windows.numel(),
        seconds=time.perf_counter() - started,
        source=source,
    )


def _sweep(
    model: nn.Module, reference: nn.Module | None, windows: torch.Tensor, batch_size: int, progress: Progress | None
) -> _Sums:
    progress = Progress() if progress is None else progress
    pieces = torch.split(windows, batch_size)
    progress.sweep(0, "evaluate", len(pieces))
    sums = _Sums()
    with torch.inference_mode(), _evaluating(model), _evaluating(reference):
        for index, piece in enumerate(pieces):
            logits = _logits(model, piece, index)
            others = None if reference is None else _logits(reference, piece, index)
            if others is not None and others.shape[-1] != logits.shape[-1]:
                raise ModelError(
                    f"the vocabularies of model and reference differ: {logits.shape[-1]} and {others.shape[-1]} "
                    "tokens; compare a model with the one that it was made from"
                )
            _add(sums, logits, others, piece.to(logits.device))
            progress.batch(piece.numel())
    return sums


def _add(sums: _Sums, logits: torch.Tensor, others: torch.Tensor | None, tokens: torch.Tensor) -> None:
    """Adds one batch: logits and others (batch, sequence, vocabulary), tokens (batch, sequence)."""
    vocabulary = logits.shape[-1]
    rows = max(1, CHUNK_VALUES // vocabulary)
    # The last position of each window has a prediction but no token to check it with: its loss does not count.
    following = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], dim=1).flatten()
    for first in range(0, tokens.numel(), rows):
        chunk = slice(first, first + rows)
        known = following[chunk] >= 0
        target = following[chunk].clamp_min(0)[:, None]
        log_q = logits.reshape(-1, vocabulary)[chunk].float().log_softmax(-1)
        sums.loss -= log_q.gather(1, target)[:, 0][known].double().sum().item()
        if others is not None:
            log_p = others.reshape(-1, vocabulary)[chunk].to(log_q.device).float().log_softmax(-1)
            sums.reference_loss -= log_p.gather(1, target)[:, 0][known].double().sum().item()
            log_q.sub_(log_p).neg_()  # log p - log q, in place
            sums.divergence += log_p.exp_().mul_(log_q).sum(-1, dtype=torch.float64).sum().item()


def _logits(model: nn.Module, tokens: torch.Tensor, index: int) -> torch.Tensor:
    batch: dict[str, Any] = {"input_ids": tokens.to(_device(model))}
    check_batch(model, batch, index)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters):
        batch["use_cache"] = False
    output = model(**batch)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != tokens.shape:
        raise ModelError(
            f"{type(model).__name__} does not return logits (batch, sequence, vocabulary); "
            "perplexity and KL divergence are for causal language models"
        )
    return logits


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """Evaluation mode for all modules; each gets its own mode back."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _load(model: nn.Module | str | Path, device: str | None) -> tuple[nn.Module, Any]:
    """The model and, for a checkpoint, its tokenizer."""
    if isinstance(model, nn.Module):
        return model, None
    from fxcalib.loading import load

    loaded = load(model, device=device or "cpu", allow_quantized=True)
    return loaded.model, loaded.processor


def _check_vocabularies(own: Any, other: Any) -> None:
    if own is None or other is None:
        return
    first, second = (getattr(t, "tokenizer", t).get_vocab() for t in (own, other))
    if first != second:
        different = next(token for token in [*first, *second] if first.get(token) != second.get(token))
        raise ModelError(
            f"the tokenizers of model and reference differ, for example in {different!r}; "
            "compare a model with the one that it was made from"
        )


def _check_windows(windows: torch.Tensor, batch_size: int) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.int64:
        raise OptionError(
            f"windows have shape {tuple(windows.shape)} and dtype {windows.dtype}; expected are (window, sequence) "
            "token ids as torch.int64, of at least 2 tokens each"
        )
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")


def _predicted(windows: torch.Tensor) -> int:
    return windows.shape[0] * (windows.shape[1] - 1)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
