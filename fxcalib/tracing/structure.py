"""Flattening of arguments and results: containers are taken apart, everything else stays one opaque value."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
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
    return not isinstance(value, (tuple, list, dict, _Opened))


class _Opened:
    """A dataclass of a batch, as a container of its fields that torch knows, without telling it of the dataclass."""

    def __init__(self, value: Any) -> None:
        self.type = type(value)
        self.fields = {f.name: open_dataclasses(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    cls, names = context
    made: Any = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # it may be frozen
    return made


pytree.register_pytree_node(
    _Opened,
    lambda opened: (list(opened.fields.values()), (opened.type, tuple(opened.fields))),
    _closed,
    flatten_with_keys_fn=lambda opened: (
        [(pytree.MappingKey(name), value) for name, value in opened.fields.items()],
        (opened.type, tuple(opened.fields)),
    ),
)


def open_dataclasses(value: Any) -> Any:
    """`value` with its dataclasses, at any depth, as containers that `flatten` takes apart and `unflatten` restores."""
    return pytree.tree_map(_opened, value, is_leaf=_is_opaque)


def _opened(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, nn.Module)):
        return value
    names = {f.name for f in dataclasses.fields(value)}
    whole = names.issuperset(getattr(value, "__dict__", ())) and all(hasattr(value, name) for name in names)
    return _Opened(value) if whole else value


def flatten_batch(batch: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """`flatten` of a batch, whose dataclasses are containers as well."""
    return flatten(open_dataclasses(dict(batch)))


def paths_of(batch: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The keys that lead to each leaf of `flatten_batch`."""
    return [path for path, _ in pytree.tree_flatten_with_path(open_dataclasses(dict(batch)), is_leaf=_is_opaque)[0]]


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a path, joined by points."""
    return ".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)


def flatten(value: object) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of nested tuples, lists, dicts and `ModelOutput`s."""
    return pytree.tree_flatten(value, is_leaf=_is_opaque)


def unflatten(spec: pytree.TreeSpec, *leaves: Any) -> Any:
    """The value whose structure is `spec` and whose leaves are `leaves`; a node function of traced graphs."""
    if not _holds_sizes(spec):
        return pytree.tree_unflatten(list(leaves), spec)
    if spec.type is torch.Size:
        return torch.Size(leaves)
    rest = iter(leaves)
    children = [unflatten(child, *itertools.islice(rest, child.num_leaves)) for child in spec.children()]
    return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(children, spec.context)


def _holds_sizes(spec: pytree.TreeSpec) -> bool:
    # torch would make plain tuples of them
    return spec.type is torch.Size or any(_holds_sizes(child) for child in spec.children())


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


def same_constant(one: Any, other: Any) -> bool:
    """Whether two values are the same for all that can be done with them: a 1 is neither True nor 1.0, NaN is NaN."""
    if isinstance(one, PLAIN):
        return type(one) is type(other) and repr(one) == repr(other)
    return bool(one == other)


def is_symbolic(value: object) -> bool:
    """Whether `value` is a symbolic int, float or bool."""
    return isinstance(value, py_sym_types)


def to_device(value: object, device: torch.device) -> Any:
    """`value` with all tensors in its containers and dataclasses on `device`."""
    leaves, spec = flatten(open_dataclasses(value))
    return unflatten(spec, *(leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def call_module(module: nn.Module, args: Any, kwargs: Any, device: torch.device) -> Any:
    """`module(*args, **kwargs)`, computed where its weights are, with arguments and result on `device`."""
    home = next((weight.device for weight in module.parameters()), device)
    if home == device:
        return module(*args, **kwargs)
    args, kwargs = to_device((args, kwargs), home)
    return to_device(module(*args, **kwargs), device)
