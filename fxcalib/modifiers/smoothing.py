"""What the modifiers have in common that move scales from the channels of one module into the weights of others."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.utils import is_match
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxcalib.errors import TargetError
from fxcalib.mappings import ChannelMapping, derive, is_linear, parse, resolve
from fxcalib.math.smoothing import divide_gain_, factors_of_reader, keep, multiply_
from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.scheme_modifier import elapsed, real_rows, refuse_non_finite
from fxcalib.modifiers.sharing import InputStatistics, SharedInputs
from fxcalib.patterns import names_of
from fxcalib.profiling import span


class SmoothingModifier(Modifier):
    """A modifier that scales channels: those of given mappings, else of those that a trace of the model shows.

    Only mappings are used by which a module gains that is to be quantized, by this or another attached modifier; where
    none is, all linear modules but the output head.
    """

    batches_observed: int | None = None
    """How many batches its statistics are of, the first ones; None for all."""

    def __init__(self, mappings: object = None, ignore: str | Sequence[str] | None = None) -> None:
        self._given = parse(mappings)
        self._ignored = [] if ignore is None else names_of(ignore, "ignore pattern")
        self._mappings: list[ChannelMapping] = []
        self._cut: list[str] = []
        self._linear: set[str] = set()
        self._statistics: dict[str, InputStatistics] = {}

    @abstractmethod
    def suits(self, model: nn.Module, mapping: ChannelMapping) -> bool:
        """Whether a derived mapping is one that the algorithm is made for."""

    @abstractmethod
    def statistic(self, width: int, device: torch.device) -> InputStatistics:
        """An empty statistic of an input with `width` channels."""

    @abstractmethod
    def scale_of(self, scope: Scope, mapping: ChannelMapping) -> tuple[Tensor | None, tuple[str, ...]]:
        """The factors (C,) float32 by which the source's channels are divided, or None for none; and notes."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What is done to a source, for reports."""

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        observed = {name for mapping in self._mappings for name in self._observed(mapping)}
        return Needs(frozenset(observed), frozenset(n for mapping in self._mappings for n in mapping.modules))

    def attach(self, model: nn.Module) -> None:
        modules = list(model.named_modules())
        for pattern in self._ignored:
            if not any(is_match(name, module, pattern) for name, module in modules):
                raise TargetError(f"ignore pattern {pattern!r} matches no module; give names of smoothed layers")
        self._linear = {name for name, module in modules if is_linear(module)}

    def prepare(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> None:
        if self._given is None:
            found = [m for m in derive(model, batch, device).mappings if self.suits(model, m)]
        else:
            found = list(resolve(model, self._given))
        wanted = quantized_modules(model) or self._linear - {_output_head(model)}
        useful = [m for m in found if any(reader.module in wanted for reader in m.readers)]
        modules = dict(model.named_modules())
        self._mappings = [
            m for m in useful if not any(is_match(m.source, modules[m.source], pattern) for pattern in self._ignored)
        ]
        if not self._mappings:
            raise TargetError(
                f"{type(self).__name__} finds nothing to scale: no norm or linear module whose channels only go to "
                "linear modules that are quantized; give mappings="
            )

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        names = {name for mapping in self._pending(scope) for name in self._observed(mapping)}
        with observed_inputs(scope, sorted(names), self.statistic, self.batches_observed) as statistics:
            yield
        self._statistics = statistics

    def commit(self, scope: Scope) -> list[ModuleResult]:
        results = []
        for mapping in self._pending(scope):
            began = time.perf_counter()
            scale_C, notes = self.scale_of(scope, mapping)
            if scale_C is not None:
                self.fold(scope, mapping, keep(scale_C, mapping.kept))
            results.append(ModuleResult(mapping.source, self.label, None, "output", elapsed(began), notes))
            self._mappings.remove(mapping)
        self._statistics = {}
        return results

    def detach(self, model: nn.Module) -> None:
        if self._cut:
            more = f" and {len(self._cut) - 1} more modules" if len(self._cut) > 1 else ""
            warnings.warn(
                f"{self._cut[0]}{more} not smoothed: what reads their channels lies in other subgraphs; choose "
                "sequential targets that hold both, such as the decoder layers",
                stacklevel=2,
            )
        self._mappings, self._cut, self._statistics = [], [], {}

    def fold(self, scope: Scope, mapping: ChannelMapping, scale_C: Tensor) -> None:
        """Divide the source's channels by `scale_C` and multiply what reads them."""
        source = scope.modules[mapping.source]
        for path, offset in mapping.offsets.items():
            parameter = source.get_parameter(path)
            divide_gain_(parameter, scale_C.to(parameter.device), offset)
        for reader in mapping.readers:
            weight = scope.modules[reader.module].get_parameter(reader.parameter)
            factor_I = factors_of_reader(scale_C, reader.index(scale_C.device))
            multiply_(weight, factor_I.to(weight.device), reader.axis)

    def statistics_of(self, name: str) -> InputStatistics | None:
        """What was observed of the inputs of a module; None where no batch reached it."""
        return self._statistics.get(name)

    def _observed(self, mapping: ChannelMapping) -> list[str]:
        readers = [reader.module for reader in mapping.readers if reader.module in self._linear]
        return readers if mapping.observed is None else [*readers, mapping.observed]

    def _pending(self, scope: Scope) -> list[ChannelMapping]:
        """The mappings that lie in this subgraph; those that begin in it and end in another one are given up."""
        here = [mapping for mapping in self._mappings if mapping.source in scope.modules]
        cut = [mapping for mapping in here if not mapping.modules <= scope.modules.keys()]
        for mapping in cut:
            self._mappings.remove(mapping)
            self._cut.append(mapping.source)
        return [mapping for mapping in here if mapping not in cut]


@contextmanager
def observed_inputs(
    scope: Scope, names: Sequence[str], make: Callable[[int, torch.device], InputStatistics], limit: int | None
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of the inputs of these modules, by name, which are complete once the context is closed.

    `limit`: how many batches count; None for all.

    Raises:
        NonFiniteActivationError: an input held NaN or infinity.
    """
    shared = SharedInputs()
    handles: list[RemovableHandle] = []
    found: dict[str, InputStatistics] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = positional[0] if positional else keywords.get("input", keywords.get("hidden_states"))
            batch = scope.batch
            if batch.original or (limit is not None and batch.index >= limit) or not isinstance(inputs, Tensor):
                return
            if inputs.is_floating_point() and inputs.numel():
                with span("statistics"):
                    make_one = lambda: make(inputs.shape[-1], inputs.device)  # noqa: E731
                    shared.see(name, None, make_one, inputs, real_rows(inputs, batch), batch.index)

        return hook

    try:
        for name in names:
            handles.append(scope.modules[name].register_forward_pre_hook(hook_for(name), with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    with span("statistics"):
        groups = shared.finish()
        refuse_non_finite(groups, [])
    found.update({name: statistics for members, statistics in groups for name in members})


def quantized_modules(model: nn.Module) -> set[str]:
    """Names of the modules that an attached modifier is to quantize."""
    return {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def _output_head(model: nn.Module) -> str | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is head), None)
