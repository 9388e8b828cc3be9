"""Whatever tracing touches is put back: module state, fake weights, random state, the patched `nn.Module.__call__`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxcalib.tracing.torch_private import FakeTensor, FakeTensorMode


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, parameters and buffers, and the random state, on leaving.

    Some models keep results of a forward on themselves (position deltas, rotary tables) or install hooks in it; what
    was made on fake tensors must not survive the trace.
    """
    dicts = list(_dicts(model))
    before = [(d, dict(d)) for d in dicts]
    try:
        with same_random_numbers_again():
            yield
    finally:
        for current, saved in before:
            if _differs(current, saved):
                current.clear()
                current.update(saved)


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


def _dicts(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The dicts that make up `model`: of its modules, and of the objects and dicts that these hold."""
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(module, 0) for module in model.modules()]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or isinstance(value, (torch.Tensor, type, ModuleType)) or (callable(value) and depth):
            continue
        seen.add(id(value))
        held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if isinstance(held, dict):
            yield held
            if depth < 3:
                pending += [(inner, depth + 1) for inner in held.values()]


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that `model` holds beside its weights, in attributes of its modules and of the objects they hold."""
    for held in _dicts(model):
        for value in held.values():
            for leaf in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


def _differs(current: dict[str, Any], saved: dict[str, Any]) -> bool:
    return current.keys() != saved.keys() or any(current[k] is not saved[k] for k in saved)


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
        _forget_memoized_tensors()


def _forget_memoized_tensors() -> None:
    # compressed-tensors memoizes the range of each quantized type: one made while fakes were on is a fake for ever
    for name, library in list(sys.modules.items()):
        if name.startswith("compressed_tensors."):
            for value in list(vars(library).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextmanager
def intercepted_calls(call: Callable[..., Any]) -> Iterator[None]:
    """Route every `nn.Module.__call__` through `call(original, module, *args, **kwargs)`."""
    original = nn.Module.__call__

    def intercepted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(original, module, *args, **kwargs)

    nn.Module.__call__ = intercepted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
