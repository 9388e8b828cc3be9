"""Flattening of arguments and results: containers are taken apart, everything else stays one opaque value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcalib.tracing.errors import GuardError
from fxcalib.tracing.torch_private import py_sym_types, pytree

PLAIN = (
    str,
    int,
    float,
    bool,
    complex,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    slice,
    type(None),
)
"""Values that a graph node holds literally."""


def _is_opaque(value: object) -> bool:
    # caches and other objects may be registered as pytrees for export; taking them apart would lose their identity
    return not isinstance(value, (tuple, list, dict))


def flatten(value: object) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of nested tuples, lists, dicts and `ModelOutput`s."""
    return pytree.tree_flatten(value, is_leaf=_is_opaque)


def unflatten(spec: pytree.TreeSpec, *leaves: Any) -> Any:
    """The value whose structure is `spec` and whose leaves are `leaves`; a node function of traced graphs."""
    return pytree.tree_unflatten(list(leaves), spec)


def leaves_of(spec: pytree.TreeSpec, value: object) -> list[Any]:
    """Leaves of `value`, which must have structure `spec`; a node function of traced graphs."""
    leaves, actual = flatten(value)
    if actual != spec:
        raise GuardError(f"a module returned another structure than when traced: {actual} instead of {spec}")
    return leaves


def is_native(spec: pytree.TreeSpec) -> bool:
    """Whether graph nodes can hold this structure literally."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(is_native(child) for child in spec.children())


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and elements, NaN like NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def is_symbolic(value: object) -> bool:
    """Whether `value` is a symbolic int, float or bool."""
    return isinstance(value, py_sym_types)


def to_device(value: object, device: torch.device) -> Any:
    """`value` with all tensors in its containers on `device`."""
    leaves, spec = flatten(value)
    return unflatten(spec, *(leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def call_module(module: nn.Module, args: Any, kwargs: Any, device: torch.device) -> Any:
    """`module(*args, **kwargs)`, computed where its weights are, with arguments and result on `device`."""
    home = next((weight.device for weight in module.parameters()), device)
    if home == device:
        return module(*args, **kwargs)
    args, kwargs = to_device((args, kwargs), home)
    return to_device(module(*args, **kwargs), device)
