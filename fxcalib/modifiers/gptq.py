"""GPTQ: weights quantized for the least error of their layer's output on the calibration data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn

from fxcalib.errors import OptionError, nearest
from fxcalib.math.gptq import Factor, Order, Unfactorable, factorize
from fxcalib.modifiers.base import ModuleResult, Scope
from fxcalib.modifiers.qargs import describe
from fxcalib.modifiers.scheme_modifier import SchemeModifier, elapsed
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.weights import pruned_part, round_to_nearest, solve_together
from fxcalib.patterns import names_of

_ORDERS = ("static", "weight")
_REMOVED_ORDERS = ("group", "dynamic")


class GPTQModifier(SchemeModifier):
    """Quantize the weights of linear modules column by column, later columns making up for the errors of earlier ones.

    Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers". Modules
    that are fed the same tensor share one Hessian and are solved as one stacked weight. Embeddings, and modules that
    no batch reaches, are rounded to nearest, with a note.

    Args:
        block_size: columns handled at once; changes speed only.
        dampening_frac: part of the Hessian's mean diagonal that is added to its diagonal; raised, with a note, where
            the Hessian is singular.
        actorder: `static` (also called `weight`) quantizes the input channels with the largest second moment first,
            with scales found beforehand; the stored format does not change. None keeps their order and finds each
            group's scale when it is reached. An `actorder` in the scheme itself goes first.
        asymmetric: solve for the outputs that modules have in the original model, on the inputs that they have in the
            compressed one, so that later modules make up for the errors of earlier ones. Unless told otherwise, the
            model is then cut at the targets themselves: within a layer that is calibrated as a whole, a module would
            make up for what the modules before it are about to correct. Takes one more forward of the model, and
            memory for the original model's values. Without propagation of errors both inputs are the same, and it
            changes nothing.
        targets, scheme, config_groups, ignore, group_size, weight_observer, input_observer, output_observer, observer,
            kv_cache_scheme: as `QuantizationModifier` has them.

    Raises:
        OptionError: arguments that contradict each other or name what does not exist.
    """

    def __init__(
        self,
        *,
        block_size: int = 128,
        dampening_frac: float = 0.01,
        actorder: str | None = "static",
        asymmetric: bool = False,
        targets: str | Sequence[str] = "Linear",
        scheme: str | Mapping[str, Any] | QuantizationScheme | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(targets=targets, scheme=scheme, **settings)
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise OptionError(f"block_size {block_size!r} must be a whole number of columns, at least 1")
        if not isinstance(dampening_frac, (int, float)) or not 0 <= dampening_frac <= 1:
            raise OptionError(f"dampening_frac {dampening_frac!r} must be between 0 and 1; 0.01 is usual")
        if actorder in _REMOVED_ORDERS:
            raise OptionError(
                f"actorder {actorder!r} was removed from compressed-tensors' formats; use 'static' or None"
            )
        if actorder is not None and actorder not in _ORDERS:
            raise OptionError(f"unknown actorder {actorder!r}: {nearest(str(actorder), _ORDERS)}, or None")
        if not isinstance(asymmetric, bool):
            raise OptionError(f"asymmetric is {asymmetric!r}; give True or False")
        self.observes_originals = asymmetric
        if asymmetric and self.sequential_targets is None:
            self.sequential_targets = names_of(targets, "target")
        self._block_size = block_size
        self._dampening_frac = dampening_frac
        for scheme_ in self._schemes:
            if scheme_.weights is not None and scheme_.weights.actorder is None and actorder is not None:
                scheme_.weights = scheme_.weights.model_copy(update={"actorder": actorder})

    def needs_hessian(self, scheme: QuantizationScheme) -> bool:
        return scheme.weights is not None

    def commit_weights(self, scope: Scope, names: Sequence[str]) -> list[ModuleResult]:
        results: list[ModuleResult] = []
        for shared in self._by_inputs(scope, names):
            statistics = self.statistics_of(shared[0])
            factors: dict[Order, Factor | str] = {}
            groups = self._by_weights(shared)
            for together in groups:
                last = together is groups[-1]
                results.extend(self._commit_together(scope, together, statistics, factors, last=last))
        return results

    def _commit_together(
        self,
        scope: Scope,
        names: list[str],
        statistics: InputStatistics | None,
        factors: dict[Order, Factor | str],
        *,
        last: bool,
    ) -> list[ModuleResult]:
        """Quantize modules of the same inputs and weight arguments; the `last` of them lets go of the Hessian."""
        began = time.perf_counter()
        args = self.scheme_of(names[0]).weights
        if args is None:
            return [ModuleResult(name, describe(self.scheme_of(name)), None, "weight", 0.0) for name in names]
        modules = [scope.modules[name] for name in names]
        order: Order = "given" if args.actorder is None else "activation"
        if order not in factors:
            factors[order] = self._factorize(statistics, modules[0], order)
        factor = factors[order]
        if last and statistics is not None:
            statistics.hessian = None
        if isinstance(factor, str):
            errors = [round_to_nearest(module, args) for module in modules]
            measure = "weight"
            notes: tuple[str, ...] = (f"rounded to nearest: {factor}",)
        else:
            shift = None if statistics is None or statistics.shift is None else statistics.shift.sum_II
            static = order == "activation"
            pruned = pruned_part(modules)
            errors = solve_together(modules, args, factor, self._block_size, static, shift, pruned)
            kept = () if pruned is None else ("pruned weights stay zero",)
            measure, notes = "output", (*factor.notes, *_unpaired(statistics), *kept)
        # One wait for the device for all of them.
        values = torch.stack(errors).tolist()
        seconds = elapsed(began) / len(names)
        return [
            ModuleResult(name, describe(self.scheme_of(name)), value, measure, seconds, notes)
            for name, value in zip(names, values, strict=True)
        ]

    def _factorize(self, statistics: InputStatistics | None, module: nn.Module, order: Order) -> Factor | str:
        """The factored Hessian, or why there is none."""
        if isinstance(module, nn.Embedding):
            return "an embedding has no inputs to calibrate on"
        if statistics is None or statistics.hessian is None:
            return "no calibration batch reached it"
        try:
            return factorize(statistics.hessian.full(), self._dampening_frac, order)
        except Unfactorable as error:
            return str(error)

    def _by_inputs(self, scope: Scope, names: Sequence[str]) -> list[list[str]]:
        groups: dict[object, list[str]] = {}
        for name in names:
            statistics = self.statistics_of(name)
            device = scope.modules[name].weight.device
            groups.setdefault(name if statistics is None else (id(statistics), device), []).append(name)
        return list(groups.values())

    def _by_weights(self, names: list[str]) -> list[list[str]]:
        groups: list[tuple[QuantizationArgs | None, list[str]]] = []
        for name in names:
            args = self.scheme_of(name).weights
            for known, members in groups:
                if known == args:
                    members.append(name)
                    break
            else:
                groups.append((args, [name]))
        return [members for _, members in groups]


def _unpaired(statistics: InputStatistics | None) -> tuple[str, ...]:
    if statistics is None or not statistics.unpaired:
        return ()
    return (f"{statistics.unpaired} of its inputs have no counterpart in the original model",)
