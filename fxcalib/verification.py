"""Holds a partition against the model itself, bit for bit, on the batch that it was traced with and on another."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcalib.errors import BatchError
from fxcalib.partitioning import Partition
from fxcalib.tracing import TraceError
from fxcalib.tracing.preserve import preserved_state
from fxcalib.tracing.structure import flatten


@dataclass(frozen=True)
class Comparison:
    """What the model and its subgraphs returned for one batch."""

    batch: str
    """The sizes of its tensors."""
    differences: tuple[str, ...]
    """Where the results differ; empty where they are the same in type, structure and bits."""
    retraced: bool
    """Whether the batch broke a guard and was traced anew."""

    @property
    def identical(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        found = "bit for bit as the model" if self.identical else "; ".join(self.differences)
        return f"{self.batch}: {found}" + (" (traced anew)" if self.retraced else "")


def compare(partition: Partition, batch: Mapping[str, Any]) -> Comparison:
    """Run the model and `partition` on the same batch and the same random numbers.

    Raises:
        BatchError: the model itself fails on the batch.
        TraceError: the batch breaks a guard and cannot be traced either.
    """
    expected = run_model(partition.traced.model, batch)
    before = partition.variants.retraces
    with preserved_state(partition.traced.model), _same_random_numbers():
        actual = partition.run(copy.deepcopy(dict(batch)))
    found = tuple(_differences(actual, expected, "the result"))
    return Comparison(sizes_of(batch), found, partition.variants.retraces > before)


def verify(partition: Partition, batch: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """`compare` on `batch` and on one of other sizes made of it, where the model takes such a one.

    Raises:
        BatchError: the model itself fails on `batch`.
        TraceError: `batch` is not the one that was traced, breaks a guard and cannot be traced either.
    """
    found = [compare(partition, batch)]
    for other in _other_sizes(batch):
        try:
            run_model(partition.traced.model, other)
        except BatchError:
            continue  # not every input may be cut or repeated: the image tokens of a text, say
        try:
            return (*found, compare(partition, other))
        except TraceError as error:
            reason = str(error).splitlines()[0]
            return (*found, Comparison(sizes_of(other), (f"breaks a guard, and {reason}",), retraced=True))
    return tuple(found)


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What `model(**batch)` returns. Model, batch and random state are left as they were.

    Raises:
        BatchError: the model fails on the batch.
    """
    given = copy.deepcopy(dict(batch))
    try:
        with torch.no_grad(), preserved_state(model), _same_random_numbers():
            return model(**given)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BatchError(
            f"{type(model).__name__} itself fails on this batch ({sizes_of(batch)}): {type(error).__name__}: {reason}; "
            "give it what its forward takes"
        ) from error


def sizes_of(batch: Mapping[str, Any]) -> str:
    """`input_ids 2x16, attention_mask 2x16`."""
    tensors = ((name, value) for name, value in batch.items() if isinstance(value, torch.Tensor))
    return ", ".join(f"{name} {'x'.join(map(str, value.shape)) or 'a number'}" for name, value in tensors)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(state)


def _other_sizes(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row more and fewer positions, then only one of both."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
    main = next((value for value in tensors if value.ndim >= 2), tensors[0] if tensors else None)
    if main is None:
        return
    rows, length = main.shape[0], main.shape[1] if main.ndim >= 2 else 1
    kept = length - max(1, length // 4)
    for more_rows, shorter in ((True, kept > 0), (True, False), (False, kept > 0)):
        if more_rows or shorter:
            yield {name: _resized(value, rows, more_rows, length, kept, shorter) for name, value in batch.items()}


def _resized(value: Any, rows: int, more_rows: bool, length: int, kept: int, shorter: bool) -> Any:
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    if shorter and value.ndim >= 2 and value.shape[1] == length:
        value = value[:, :kept]
    return torch.cat([value, value[:1]]) if more_rows and value.shape[0] == rows else value.clone()


def _differences(actual: Any, expected: Any, where: str) -> Iterator[str]:
    if type(actual) is not type(expected):
        yield f"{where} is a {type(actual).__name__}, not a {type(expected).__name__}"
        return
    have, structure = flatten(actual)
    want, wanted = flatten(expected)
    if structure != wanted:
        yield f"{where} has another structure: {structure} instead of {wanted}"
        return
    names = list(expected) if isinstance(expected, dict) and len(expected) == len(want) else range(len(want))
    for name, a, b in zip(names, have, want, strict=True):
        place = str(name) if len(want) > 1 or isinstance(expected, dict) else where
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            yield from _different_tensors(a, b, place)
        elif hasattr(b, "__dict__") and not callable(b):  # a key-value cache, or one of its layers
            yield from _differences(vars(a), vars(b), place)
        elif not callable(b) and a != b:
            yield f"{place} is {a!r}, not {b!r}"


def _different_tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> Iterator[str]:
    if a.shape != b.shape or a.dtype != b.dtype:
        yield f"{where} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        return
    different = (a != b) & ~(a.isnan() & b.isnan())
    if bool(different.any()):
        largest = (a[different].double() - b[different].double()).abs().max()
        yield f"{where} differs in {int(different.sum())} of {a.numel()} elements, by {largest:.3g} at most"
