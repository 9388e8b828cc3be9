"""Whatever tracing touches is put back: module state, fake weights, random state, the patched `nn.Module.__call__`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcalib.tracing.torch_private import FakeTensor, FakeTensorMode


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, parameters and buffers, and torch's random state, on leaving.

    Some models keep results of a forward on themselves (position deltas, rotary tables) or install hooks in it; what
    was made on fake tensors must not survive the trace.
    """
    dicts: list[dict[str, Any]] = []
    for module in model.modules():
        dicts += [module.__dict__, *(v for v in module.__dict__.values() if isinstance(v, dict))]
    before = [(d, dict(d)) for d in dicts]
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        for current, saved in before:
            if _differs(current, saved):
                current.clear()
                current.update(saved)


def _differs(current: dict[str, Any], saved: dict[str, Any]) -> bool:
    return current.keys() != saved.keys() or any(current[k] is not saved[k] for k in saved)


@contextmanager
def fake_weights(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[dict[int, str]]:
    """Put fake tensors on `device` in the place of all parameters and buffers; yields id of each fake -> its path.

    No weight value is read, a model on the meta device is traced as if it lay on `device`, and what is tied stays tied.
    """
    fakes: dict[int, FakeTensor] = {}
    paths: dict[int, str] = {}
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for name, module in model.named_modules():
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                    fakes[id(tensor)] = FakeTensor(mode, meta, device)
                    paths[id(fakes[id(tensor)])] = f"{name}.{key}" if name else key
                replaced.append((group, key, tensor))
                group[key] = fakes[id(tensor)]
    try:
        yield paths
    finally:
        for group, key, tensor in replaced:
            group[key] = tensor
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
