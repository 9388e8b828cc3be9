"""The sets of sequential targets that models are scored with, and what their forwards call of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.zoo.outputs import copied

LINEAR_CLASSES = (nn.Linear, Conv1D)

SIDE_TOWER = re.compile(
    r"vis|image|audio|tower|speech|patch|conv|proj|sam|encoder(?!s)|qformer|perceiver|resampler|aligner|connector"
    r"|codec|vq"
)
"""Names of stacks that are not the decoder."""

DECODER_CLASSES: Mapping[str, Sequence[str]] = {
    "git": ["GitLayer"],
    "idefics": ["IdeficsDecoderLayer", "IdeficsGatedCrossAttentionLayer"],
}
"""Model type -> classes of its decoder's layers, where no one stack has them all."""


@dataclass(frozen=True)
class TargetSets:
    """Class names of the sequential targets."""

    default: tuple[str, ...]
    """The model's `_no_split_modules` that it calls; else those of all its stacks of layers; else of its children."""
    decoder: tuple[str, ...]
    """The layers of the decoder alone: of the largest stack that is no side tower."""
    linear: tuple[str, ...] = ()
    """Every linear module that it calls, inside of attention and MLP."""


@dataclass(frozen=True)
class _Stack:
    name: str
    parameters: int
    classes: tuple[str, ...]


def target_sets(model: nn.Module, batch: Mapping[str, Any]) -> TargetSets:
    """All sets for `model`, from what its eager forward of `batch` calls."""
    called = _calls(model, {name: module for name, module in model.named_modules() if name}, batch)
    present = {type(module).__name__ for name, module in model.named_modules() if called[name]}
    declared = tuple(sorted(name for name in getattr(model, "_no_split_modules", None) or () if name in present))
    # the last of these: layers that are entered through their `forward`, which hooks don't see
    stacks = _stacks(model, called, 3) or _stacks(model, called, 2) or _stacks(model, None, 3)
    outer = [s for s in stacks if not any(s is not o and s.name.startswith(o.name + ".") for o in stacks)]
    decoder = tuple(DECODER_CLASSES.get(getattr(getattr(model, "config", None), "model_type", ""), ()))
    if outer and not decoder:
        decoders = [stack for stack in outer if not SIDE_TOWER.search(stack.name)] or outer
        decoder = max(decoders, key=lambda stack: stack.parameters).classes
    layers = tuple(sorted({name for stack in outer for name in stack.classes}))
    children = tuple(sorted({type(child).__name__ for name, child in model.named_children() if called[name]}))
    linear = {type(m).__name__ for name, m in model.named_modules() if called[name] and isinstance(m, LINEAR_CLASSES)}
    return TargetSets(declared or layers or children, decoder or declared or children, tuple(sorted(linear)))


def expected_calls(
    model: nn.Module, targets: Collection[str], batch: Mapping[str, Any], innermost: bool = False
) -> Counter[int]:
    """How often the eager forward of `batch` calls each target, by `id` of the module.

    Of targets that lie within each other only the outermost count, or only the `innermost`.
    """
    matching = {name: module for name, module in model.named_modules() if type(module).__name__ in targets}
    names = list(matching)

    def shadowed(name: str) -> bool:
        if innermost:
            return any(other.startswith(f"{name}.") for other in names)
        return any(name.startswith(f"{other}.") for other in names)

    wanted = {name: module for name, module in matching.items() if not shadowed(name)}
    calls = _calls(model, wanted, batch)
    return Counter({id(module): calls[name] for name, module in wanted.items() if calls[name]})


def _calls(model: nn.Module, watched: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> Counter[str]:
    calls: Counter[str] = Counter()
    with _counting(watched, calls), torch.no_grad():
        torch.manual_seed(0)
        model(**copied(batch))
    return calls


@contextmanager
def _counting(watched: Mapping[str, nn.Module], calls: Counter[str]) -> Iterator[None]:
    """Count forwards, not calls: some models enter layers through their `forward`."""

    def counted(name: str, forward: Any) -> Any:
        @wraps(forward)
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        return count

    own = {name: module.__dict__.get("forward") for name, module in watched.items()}
    for name, module in watched.items():
        module.__dict__["forward"] = counted(name, module.forward)
    try:
        yield
    finally:
        for name, module in watched.items():
            del module.__dict__["forward"]
            if own[name] is not None:
                module.__dict__["forward"] = own[name]


def _stacks(model: nn.Module, called: Counter[str] | None, least_parts: int) -> list[_Stack]:
    """Every list of modules that looks like layers: each with weights in at least `least_parts` of its modules."""
    found = []
    for name, stack in model.named_modules():
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
            continue
        members = {f"{name}.{key}" if name else key: member for key, member in stack.named_children()}
        layers = {
            key: member
            for key, member in members.items()
            if (called is None or called[key])
            and not isinstance(member, (nn.ModuleList, nn.ModuleDict))
            and sum(any(True for _ in part.parameters(recurse=False)) for part in member.modules()) >= least_parts
        }
        repeated = called is not None and any(called[key] >= 2 for key in layers)
        if len(layers) >= 2 or (layers and repeated):
            classes = tuple(sorted({type(layer).__name__ for layer in layers.values()}))
            found.append(_Stack(name, sum(p.numel() for p in stack.parameters()), classes))
    return found
