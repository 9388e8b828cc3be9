"""Whether a batch suits a model, and what identifies batches that a user brings along."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcalib.errors import BatchError, nearest
from fxcalib.tracing.structure import open_dataclasses

TOKEN_KEYS = ("input_ids", "inputs_embeds", "encoder_outputs")
"""Keys of which transformers' text models need one, though their signatures call all of them optional."""

LOSS_MASK = "loss_mask"
"""Key of a mask (batch, sequence) that is not for the model: true where a token counts for statistics."""

_TYPO = 0.8


def check_batch(model: nn.Module, batch: object, index: int) -> None:
    """Raise BatchError where `model(**batch)` cannot work; `index` is the position of the batch in the data, from 0.

    Looked for: a batch that is no mapping or is empty, values that hold no tensor, a key that the model's forward
    needs and the batch lacks, a key that it does not take, and token ids without a row in the input embedding.
    """
    if not isinstance(batch, Mapping) or not all(isinstance(key, str) for key in batch):
        raise BatchError(
            f"batch {index} is {_kind(batch)}; each batch must be a dict of tensors that the model's forward takes, "
            "such as {'input_ids': (batch, sequence) int64}"
        )
    if not batch:
        raise BatchError(f"batch {index} is an empty dict; check the data loader's collate function")
    for key, value in batch.items():
        _check_value(key, value, index)
    _check_keys(model, without_loss_mask(batch), index)
    if LOSS_MASK in batch:
        _check_loss_mask(batch, index)
    for key in ("input_ids", "decoder_input_ids"):
        if isinstance(batch.get(key), torch.Tensor):
            _check_tokens(model, key, batch[key], index)


def without_loss_mask(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """`batch` as the model is called with it."""
    return {key: value for key, value in batch.items() if key != LOSS_MASK} if LOSS_MASK in batch else batch


def fingerprint_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """sha256 over keys, dtypes, shapes and values of all batches, hexadecimal; iterates over them once.

    The order of keys does not matter; that of batches does. Tensors may be on any device.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            leaves, structure = pytree.tree_flatten(open_dataclasses(batch[key]))
            digest.update(f"{key} {structure}\n".encode())
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    digest.update(f"{leaf.dtype} {tuple(leaf.shape)}\n".encode())
                    data = leaf.detach().cpu().contiguous().reshape(-1)
                    digest.update(data.view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(f"{leaf!r}\n".encode())
        digest.update(b"end of batch\n")
    return digest.hexdigest()


def _check_value(key: str, value: object, index: int) -> None:
    leaves = pytree.tree_leaves(open_dataclasses(value))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            raise BatchError(
                f"batch {index} is empty: {key!r} has shape {tuple(leaf.shape)}; leave out empty samples and batches"
            )
    scalar = value is None or isinstance(value, (bool, int, float, str))
    if not scalar and not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise BatchError(f"{key!r} of batch {index} is {_kind(value)}, no tensor; convert it with torch.tensor")


def _check_loss_mask(batch: Mapping[str, Any], index: int) -> None:
    mask, ids = batch[LOSS_MASK], batch.get("input_ids")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        found = f"has shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"is {_kind(mask)}"
        raise BatchError(f"{LOSS_MASK!r} of batch {index} {found} where a tensor (batch, sequence) is expected")
    if isinstance(ids, torch.Tensor) and ids.shape != mask.shape:
        raise BatchError(
            f"{LOSS_MASK!r} of batch {index} has shape {tuple(mask.shape)}, but 'input_ids' {tuple(ids.shape)}; "
            "both must be (batch, sequence)"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BatchError(f"{LOSS_MASK!r} of batch {index} holds other values than 0 and 1; give a mask of tokens")


def _check_keys(model: nn.Module, batch: Mapping[str, object], index: int) -> None:
    parameters = [p for n, p in inspect.signature(model.forward).parameters.items() if n != "self"]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needs = [name for name, p in named.items() if p.default is p.empty and name not in batch]
    alternatives = [name for name in TOKEN_KEYS if name in named]
    if "input_ids" in alternatives and not any(batch.get(name) is not None for name in alternatives):
        needs.append("input_ids")
    if needs:
        name = needs[0]
        others = " or ".join(repr(a) for a in alternatives[1:]) if name == "input_ids" else ""
        raise BatchError(
            f"batch {index} lacks {name!r}{f' (or {others})' if others else ''}, which {type(model).__name__}.forward "
            f"needs; its keys are {', '.join(map(repr, batch))}: rename or add one"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in batch:
        if key in named:
            continue
        # Behind **kwargs lie the forwards of submodules and attention functions: there only a likely typo is refused.
        if takes_all and (not difflib.get_close_matches(key, named, n=1, cutoff=_TYPO) or key in _taken_inside(model)):
            continue
        raise BatchError(
            f"{type(model).__name__}.forward takes no {key!r}, which batch {index} has; {nearest(key, named)} "
            "Else leave it out of the batches"
        )


def _taken_inside(model: nn.Module) -> set[str]:
    """Parameter names of the forwards of all submodules."""
    forwards = {type(module): module.forward for module in model.modules()}
    return {name for forward in forwards.values() for name in inspect.signature(forward).parameters}


def _check_tokens(model: nn.Module, key: str, tokens: torch.Tensor, index: int) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise BatchError(f"{key!r} of batch {index} has dtype {tokens.dtype}; token ids must be integers: use .long()")
    if tokens.ndim < 2:
        raise BatchError(
            f"{key!r} of batch {index} has shape {tuple(tokens.shape)} where (batch, sequence) is expected; "
            "batch the samples, with a DataLoader or .unsqueeze(0)"
        )
    rows = _embedding_rows(model)
    if rows is None or tokens.is_meta:
        return
    for wrong in (int(tokens.max()), int(tokens.min())):
        if not 0 <= wrong < rows:
            raise BatchError(
                f"token id {wrong} in {key!r} of batch {index} is not in the model's vocabulary of {rows} tokens "
                f"(0 to {rows - 1}); the data was probably tokenized with another model's tokenizer"
            )


def _embedding_rows(model: nn.Module) -> int | None:
    """Rows of the input embedding; None where the model does not say which module that is."""
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        embedding = getter()
    except (NotImplementedError, AttributeError):  # transformers raises these for models without a text embedding
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def _kind(value: object) -> str:
    """`a list`, `an int`, ..."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
