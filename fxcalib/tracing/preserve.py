"""Whatever tracing touches is put back: module state, fake weights, random state, the patched `nn.Module` methods."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from fxcalib.tracing.structure import PLAIN
from fxcalib.tracing.torch_private import FakeTensor, FakeTensorMode


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, parameters and buffers, and the random state, on leaving.

    Some models keep results of a forward on themselves (position deltas, rotary tables) or install hooks in it; what
    was made on fake tensors must not survive the trace.
    """
    with preserved_attributes(dict(model.named_modules())), same_random_numbers_again():
        yield


@contextmanager
def preserved_attributes(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Restore the attributes of `modules`, and what is in the objects and containers that they hold, on leaving."""
    before = [(container.held, copy.copy(container.held)) for container in containers(modules)]
    try:
        yield
    finally:
        for current, saved in before:
            if _differs(current, saved):
                current.clear()
                (current.extend if isinstance(current, (list, deque)) else current.update)(saved)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """`preserved_state`, and what is written to the buffers of `model` in place is undone too: it is only tried."""
    with preserved_state(model), saved_tensors() as saved:
        saved.save(model.buffers())
        yield


@contextmanager
def same_random_numbers_again() -> Iterator[None]:
    """What draws random numbers inside, from torch, Python or numpy, draws the same when it is run again."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class SavedTensors:
    """Tensors as they were when they were saved."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def save(self, tensors: Iterable[torch.Tensor]) -> None:
        """Save those that are not saved yet and have data."""
        for tensor in tensors:
            if id(tensor) not in self._saved and not tensor.is_meta:
                self._saved[id(tensor)] = (tensor, tensor._version, tensor.detach().clone())

    def restore(self) -> None:
        """Put back what was written to since."""
        with torch.no_grad():
            for tensor, version, copied in self._saved.values():
                if tensor._version != version:
                    tensor.copy_(copied)
        self._saved.clear()


@contextmanager
def saved_tensors() -> Iterator[SavedTensors]:
    """What is saved inside is put back on leaving."""
    saved = SavedTensors()
    try:
        yield saved
    finally:
        saved.restore()


class Container(NamedTuple):
    """A dict, list or set that is part of a model."""

    module: str
    """Qualified name of the module that it belongs to."""
    attribute: str
    """The attribute of the module that holds it; empty where its entries are the attributes, parameters or buffers."""
    held: Any


_ATTRIBUTES = ("", "_parameters", "_buffers")


def containers(modules: Mapping[str, nn.Module]) -> Iterator[Container]:
    """What makes up `modules`: their attributes, and those of the objects and containers that these hold."""
    seen: set[int] = set()
    pending: list[tuple[str, str, Any, int]] = [(name, "", module, 0) for name, module in modules.items()]
    while pending:
        name, attribute, value, depth = pending.pop()
        if id(value) in seen or isinstance(value, (torch.Tensor, type, ModuleType)) or (callable(value) and depth):
            continue
        seen.add(id(value))
        held = value if isinstance(value, (dict, list, set, deque, tuple)) else getattr(value, "__dict__", None)
        if isinstance(held, (dict, list, set, deque)):
            yield Container(name, attribute, held)
        if depth < 3 and isinstance(held, (dict, list, set, deque, tuple)):
            for key, inner in held.items() if isinstance(held, dict) else enumerate(held):
                if not isinstance(inner, PLAIN):
                    path = str(key) if attribute in _ATTRIBUTES else attribute
                    pending.append((name, "" if path in _ATTRIBUTES else path, inner, depth + 1))


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that `model` holds beside its weights, in attributes of its modules and of the objects they hold."""
    for container in containers(dict(model.named_modules())):
        for value in container.held.values() if isinstance(container.held, dict) else container.held:
            for leaf in value if isinstance(value, tuple) else (value,):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


def _differs(current: Any, saved: Any) -> bool:
    if isinstance(current, dict):
        return current.keys() != saved.keys() or any(current[key] is not saved[key] for key in saved)
    return list(map(id, current)) != list(map(id, saved))


@dataclass
class FakeWeights:
    """What `fake_weights` has put where."""

    paths: dict[int, str] = field(default_factory=dict)
    """Id of each fake -> qualified name."""
    originals: dict[int, torch.Tensor] = field(default_factory=dict)
    """Id of each fake -> the tensor that it stands for."""
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The weights themselves, while the context is open."""
        now = [(group, key, group[key]) for group, key in self.places]
        for group, key, tensor in now:
            group[key] = self.originals.get(id(tensor), tensor)
        try:
            yield
        finally:
            for group, key, tensor in now:
                group[key] = tensor


@contextmanager
def fake_weights(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[FakeWeights]:
    """Put fake tensors on `device` in the place of all parameters and buffers.

    No weight value is read, a model on the meta device is traced as if it lay on `device`, and what is tied stays tied.
    """
    fakes: dict[int, FakeTensor] = {}
    weights = FakeWeights()
    _forget_memoized_tensors(model)
    for name, module in model.named_modules():
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                    fakes[id(tensor)] = FakeTensor(mode, meta, device)
                    weights.paths[id(fakes[id(tensor)])] = f"{name}.{key}" if name else key
                    weights.originals[id(fakes[id(tensor)])] = tensor
                weights.places.append((group, key))
                group[key] = fakes[id(tensor)]
    originals = {(id(group), key): weights.originals[id(group[key])] for group, key in weights.places}
    try:
        yield weights
    finally:
        for group, key in weights.places:
            group[key] = originals[id(group), key]
        _forget_memoized_tensors(model)


def _forget_memoized_tensors(model: nn.Module) -> None:
    """Clear the memoized functions of the modules that `model` is written in.

    A tensor that one made while fakes were on would be a fake for ever, and one from before would be baked in.
    compressed-tensors memoizes the range of each quantized type.
    """
    written_in = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    for name, library in list(sys.modules.items()):
        if name in written_in or name.startswith("compressed_tensors."):
            for value in list(vars(library).values()):
                if isinstance(value, _lru_cache_wrapper) and value.__module__ == name:
                    value.cache_clear()


@contextmanager
def intercepted_calls(call: Callable[..., Any]) -> Iterator[None]:
    """Route every `nn.Module.__call__` through `call(original, module, *args, **kwargs)`."""
    original = nn.Module.__call__

    def intercepted(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return call(original, module, *args, **kwargs)

    nn.Module.__call__ = intercepted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def intercepted_assignments(assign: Callable[..., Any]) -> Iterator[None]:
    """Route every `nn.Module.__setattr__` through `assign(original, module, name, value)`."""
    original = nn.Module.__setattr__

    def intercepted(module: nn.Module, name: str, value: Any) -> None:
        assign(original, module, name, value)

    nn.Module.__setattr__ = intercepted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
