"""What the pruning modifiers have in common: sparsity and mask structure, targets, statistics of inputs."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from fxcalib.errors import OptionError, TargetError
from fxcalib.math.pruning import Pattern
from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.scheme_modifier import elapsed, real_rows, refuse_non_finite
from fxcalib.modifiers.schemes import (
    check_finite,
    ignored_patterns,
    refuse_quantized,
    refuse_quantized_module,
    refuse_tied,
    suggest,
)
from fxcalib.modifiers.sharing import InputStatistics, SharedInputs
from fxcalib.modifiers.weights import PRUNED
from fxcalib.patterns import names_of
from fxcalib.profiling import span

_UNSTRUCTURED = ("0:0", "unstructured")
_TILE = 16
"""Sparse tensor cores multiply 2:4 weights whose sizes are multiples of this."""


@dataclass(frozen=True)
class Pruning:
    """Weights that were pruned together."""

    weights: list[Tensor]
    errors: list[Tensor]
    """Relative squared error of each, 0-dim."""
    measure: str
    """What the errors are relative to, as `ModuleResult` has it."""
    notes: tuple[str, ...] = ()


class SparsityModifier(Modifier):
    """A modifier that sets weights of linear modules to zero.

    Checkpoints hold pruned weights as they are, zeros included: compressed-tensors and vLLM have given up their formats
    for sparse weights.

    Args:
        sparsity: the part of each weight to prune, in [0, 1); for an N:M structure None, or the sparsity it has.
        mask_structure: `N:M` keeps at most N of every M consecutive weights of an output channel, as sparse tensor
            cores want it for `2:4`; `0:0` or `unstructured` lets zeros lie anywhere.
        targets: names, classes or `re:` patterns of linear modules, or of modules that contain some.
        ignore: names, classes or patterns to leave alone; None ignores the output head where there is one.
        sequential_targets: modules to cut the model at.
        preserve_sparsity_mask: weights that are zero already stay so and count as pruned.

    Raises:
        OptionError: arguments that contradict each other or are out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float | None,
        mask_structure: str,
        targets: str | Sequence[str],
        ignore: str | Sequence[str] | None,
        sequential_targets: str | Sequence[str] | None,
        preserve_sparsity_mask: bool,
    ) -> None:
        asked = None if sequential_targets is None else names_of(sequential_targets, "sequential target")
        self.sequential_targets = asked
        self._sparsity = _structured(sparsity, mask_structure)
        self._targets = names_of(targets, "target")
        self._ignore = None if ignore is None else names_of(ignore, "ignore pattern")
        self._preserve = preserve_sparsity_mask
        self._pruned: dict[str, nn.Linear] = {}
        self._unchecked: set[str] = set()
        self._committed: set[str] = set()
        self._inputs: dict[str, InputStatistics] = {}

    @property
    @abstractmethod
    def makes_statistics(self) -> Callable[[Tensor], InputStatistics] | None:
        """What begins the statistics of inputs (..., I); None where no data is needed."""

    @abstractmethod
    def prune(
        self, weights: Sequence[Tensor], sparsity: float | Pattern, statistics: InputStatistics | None
    ) -> Pruning:
        """Prune weights (O, I) that share their inputs."""

    def sparsity_of(self, name: str) -> float | Pattern:
        """What a module is pruned to."""
        return self._sparsity

    @property
    def needs_data(self) -> bool:
        return self.makes_statistics is not None

    @property
    def needs(self) -> Needs:
        names = frozenset(self._pruned)
        return Needs(observed=names if self.needs_data else frozenset(), committed=names)

    def attach(self, model: nn.Module) -> None:
        pruned = self._resolve(model)
        for name, module in pruned.items():
            check_finite(name, module)
        self._unchecked = {name for name, module in pruned.items() if module.weight.is_meta}
        self._pruned, self._committed = pruned, set()
        for module in pruned.values():
            setattr(module, PRUNED, True)

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        make = self.makes_statistics
        pending = {name: scope.modules[name] for name in self._pending(scope)}
        with observed_inputs(scope, pending, make) as inputs:
            yield
        self._inputs = inputs

    def commit(self, scope: Scope) -> list[ModuleResult]:
        names = self._pending(scope)
        for name in names:
            if name in self._unchecked:
                check_finite(name, scope.modules[name])
        results: dict[str, ModuleResult] = {}
        for together in self._together(names):
            results |= self._commit_together(together)
        self._committed.update(names)
        self._inputs = {}
        return [results[name] for name in names]

    def detach(self, model: nn.Module) -> None:
        for name in self._pruned.keys() - self._committed:
            self._pruned[name].__dict__.pop(PRUNED, None)
        self._inputs, self._pruned, self._committed = {}, {}, set()

    def _pending(self, scope: Scope) -> list[str]:
        return [name for name in scope.modules if name in self._pruned and name not in self._committed]

    def _together(self, names: Sequence[str]) -> list[list[str]]:
        """Modules of the same inputs, device and sparsity."""
        groups: dict[Hashable, list[str]] = {}
        for name in names:
            statistics = self._inputs.get(name)
            device = self._pruned[name].weight.device
            key = name if statistics is None else (id(statistics), device, self.sparsity_of(name))
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _commit_together(self, names: list[str]) -> dict[str, ModuleResult]:
        began = time.perf_counter()
        sparsity = self.sparsity_of(names[0])
        modules = [self._pruned[name] for name in names]
        originals = [module.weight.detach() for module in modules]
        pruning = self.prune(originals, sparsity, self._inputs.get(names[0]))
        zeros = []
        for module, weight in zip(modules, pruning.weights, strict=True):
            with torch.no_grad():
                module.weight.copy_(weight)
            zeros.append((module.weight == 0).sum() / module.weight.numel())
        # One wait for the device for all of them.
        values, achieved = torch.stack([torch.stack(pruning.errors), torch.stack(zeros)]).tolist()
        seconds = elapsed(began) / len(names)
        texts = [f"{sparsity} sparse" if isinstance(sparsity, Pattern) else f"{part:.0%} sparse" for part in achieved]
        return {
            name: ModuleResult(name, text, value, pruning.measure, seconds, pruning.notes)
            for name, text, value in zip(names, texts, values, strict=True)
        }

    def _resolve(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The modules to prune, by qualified name in the order of the model.

        Raises:
            AlreadyQuantizedError: the model is quantized.
            TargetError: a target or ignore pattern that matches no module, or nothing is left to prune.
            OptionError: a width that the mask structure does not divide; a weight that is tied to another module's; a
                module that another modifier prunes, or that one before this quantizes.
        """
        refuse_quantized(model)
        ignored = ignored_patterns(model, self._ignore)
        wanted: set[str] = set()
        for target in self._targets:
            matched = dict(match_named_modules(model, [target]))
            if not matched:
                raise TargetError(f"target {target!r} matches no module: {suggest(target, model)}")
            inside = {
                _join(name, inner)
                for name, m in matched.items()
                for inner, each in m.named_modules()
                if _prunable(each)
            }
            if not inside:
                kinds = ", ".join(sorted({type(module).__name__ for module in matched.values()}))
                raise TargetError(f"target {target!r} matches only {kinds}; Linear modules can be pruned")
            wanted |= inside
        left_alone = dict(match_named_modules(model, ignored)) if ignored else {}
        found = {
            name: module
            for name, module in model.named_modules()
            if name in wanted and isinstance(module, nn.Linear) and not _within(name, left_alone)
        }
        if not found:
            raise TargetError(
                f"nothing to prune: every module that {self._targets} match is ignored by {ignored}; ignore less"
            )
        for name, module in found.items():
            refuse_quantized_module(name, module)
            self._refuse_taken(name, module)
        refuse_tied(model, found)
        if isinstance(self._sparsity, Pattern):
            _check_widths(found, self._sparsity)
        return found

    def _refuse_taken(self, name: str, module: nn.Linear) -> None:
        if hasattr(module, "quantization_scheme"):
            raise OptionError(
                f"module {name!r} is quantized by a modifier before {type(self).__name__}, and pruned weights would "
                f"leave its grid; put {type(self).__name__} first"
            )
        if hasattr(module, PRUNED) and not self._preserve:
            raise OptionError(
                f"module {name!r} is pruned by another modifier already; give each its own targets, or keep what that "
                "one has pruned with preserve_sparsity_mask=True"
            )


@contextmanager
def observed_inputs(
    scope: Scope, modules: dict[str, nn.Module], make: Callable[[Tensor], InputStatistics] | None
) -> Iterator[dict[str, InputStatistics]]:
    """Collect statistics of the inputs of `modules`, by name: there when the context ends, shared where inputs are.

    Raises:
        NonFiniteActivationError: an input held NaN or infinity.
    """
    shared = SharedInputs()
    found: dict[str, InputStatistics] = {}

    def see(name: str, begin: Callable[[Tensor], InputStatistics]) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = positional[0] if positional else keywords.get("input")
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not inputs.numel():
                return
            if scope.batch.original:
                return
            with span("statistics"):
                real = real_rows(inputs, scope.batch)
                shared.see(name, None, lambda: begin(inputs), inputs, real, scope.batch.index)

        return hook

    handles = []
    if make is not None:
        handles = [m.register_forward_pre_hook(see(n, make), with_kwargs=True) for n, m in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    with span("statistics"):
        groups = shared.finish()
        refuse_non_finite(groups, [])
    found.update({name: statistics for names, statistics in groups for name in names})


def _structured(sparsity: float | None, mask_structure: str) -> float | Pattern:
    """What to prune to: a part of the weights, or a pattern."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if sparsity is not None and not (number and 0 <= sparsity < 1):
        raise OptionError(f"sparsity {sparsity!r} must be the part of the weights to prune, in [0, 1), such as 0.5")
    pattern = None if mask_structure in _UNSTRUCTURED else _pattern(mask_structure)
    if pattern is None:
        if sparsity is None:
            raise OptionError(
                f"mask_structure {mask_structure!r} leaves the sparsity open; give it, such as sparsity=0.5"
            )
        return float(sparsity)
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise OptionError(
            f"sparsity {sparsity:g} contradicts mask_structure '{pattern}', which keeps {pattern.kept} of every "
            f"{pattern.run} weights: its sparsity is {pattern.sparsity:g}; leave one of them out"
        )
    return pattern


def _pattern(mask_structure: object) -> Pattern:
    kept, colon, run = str(mask_structure).partition(":")
    if not (isinstance(mask_structure, str) and colon and kept.isdecimal() and run.isdecimal()):
        raise OptionError(f"mask_structure {mask_structure!r} must be 'N:M', such as '2:4', or '0:0' for any mask")
    if not 0 < int(kept) < int(run):
        raise OptionError(
            f"mask_structure {mask_structure!r} must keep more than none and fewer than all of its weights"
        )
    return Pattern(int(kept), int(run))


def _check_widths(modules: dict[str, nn.Linear], pattern: Pattern) -> None:
    uneven = [f"{name} ({m.in_features})" for name, m in modules.items() if m.in_features % pattern.run]
    if uneven:
        raise OptionError(
            f"mask_structure '{pattern}' does not divide the input width of {_listed(uneven)}; choose a structure that "
            "does, or ignore these modules"
        )
    slow = [f"{n} {tuple(m.weight.shape)}" for n, m in modules.items() if any(s % _TILE for s in m.weight.shape)]
    if pattern == Pattern(2, 4) and slow:
        warnings.warn(
            f"mask_structure '2:4' of {_listed(slow)}: sparse tensor cores take sizes that are multiples of {_TILE}; "
            "these modules are pruned, but will not be faster for it",
            stacklevel=2,
        )


def _prunable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _join(outer: str, inner: str) -> str:
    return ".".join(part for part in (outer, inner) if part)


def _within(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module or one that contains it is among `modules`."""
    return any(name == outer or name.startswith(f"{outer}.") for outer in modules if outer)


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more
