"""What a model returns as plain tensors, and whether two of those hold the same bits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a batch: a forward may write to its inputs."""
    return {key: copy.deepcopy(value) for key, value in batch.items()}


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """Path -> tensor of all that `output` holds: in lists, mappings, dataclasses and other objects such as caches."""
    found: dict[str, torch.Tensor] = {}
    _walk(output, "", found, {}, set())
    return found


def structure(output: Any) -> dict[str, str]:
    """Path -> type of everything that `output` holds."""
    types: dict[str, str] = {}
    _walk(output, "", {}, types, set())
    return types


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit; any two NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.device.type == "meta":
        return False
    if a.is_complex():
        return same_bits(torch.view_as_real(a), torch.view_as_real(b))
    if not a.is_floating_point():
        return torch.equal(a, b)
    kind = _BITS[a.element_size()]
    different = a.contiguous().view(kind) != b.contiguous().view(kind)
    return not bool((different & ~(a.isnan() & b.isnan())).any())


def difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str | None:
    """What differs between two outputs as one line; None where all bits are the same."""
    missing, extra = [k for k in expected if k not in found], [k for k in found if k not in expected]
    if missing or extra:
        return f"outputs differ: without {missing[:3]}, with {extra[:3]}"
    for key, tensor in expected.items():
        other = found[key]
        if same_bits(tensor, other):
            continue
        if tensor.shape != other.shape or tensor.dtype != other.dtype or other.device != tensor.device:
            had, has = ([list(t.shape), str(t.dtype), str(t.device)] for t in (tensor, other))
            return f"{key} is {has} instead of {had}"
        apart = (tensor.double() - other.double()).abs().nan_to_num() if not tensor.is_complex() else None
        return f"{key} differs" + (f" by up to {float(apart.max()):.2g}" if apart is not None else "")
    return None


def main_tensor(found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits, else the first tensor of floats, else the first."""
    for key, tensor in found.items():
        if key.split(".")[-1] == "logits":
            return tensor
    return next((t for t in found.values() if t.is_floating_point()), next(iter(found.values())))


def _walk(value: Any, path: str, found: dict[str, torch.Tensor], types: dict[str, str], seen: set[int]) -> None:
    types[path] = type(value).__name__
    if isinstance(value, torch.Tensor):
        found[path or "output"] = value
        return
    if isinstance(value, (*_PLAIN, nn.Module, PretrainedConfig, type)) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in _items(value):
        _walk(item, f"{path}.{key}" if path else str(key), found, types, seen)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return [(key, item) for key, item in value.items() if item is not None]
    if isinstance(value, (list, tuple)):
        return [(index, item) for index, item in enumerate(value) if item is not None]
    if dataclasses.is_dataclass(value):
        fields = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
        return [(name, item) for name, item in fields if item is not None]
    return [(key, item) for key, item in getattr(value, "__dict__", {}).items() if not callable(item)]
