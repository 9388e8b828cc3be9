"""What the quantizing modifiers have in common: attaching schemes, observing inputs and outputs, storing parameters."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationMetadata,
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxcalib.errors import NonFiniteActivationError, OptionError
from fxcalib.math.hessian import Hessian, InputShift
from fxcalib.math.ranges import MinMax, Range
from fxcalib.modifiers import qargs
from fxcalib.modifiers.base import CurrentBatch, Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.fused_inputs import FusedInputs
from fxcalib.modifiers.global_scales import SharedGlobalScales
from fxcalib.modifiers.kv_cache import KeyValueCache, read_kv_cache_scheme
from fxcalib.modifiers.schemes import build_schemes, check_finite, refuse_quantized, resolve
from fxcalib.modifiers.sharing import InputStatistics, OriginalInputs, SharedInputs, union_of_extremes
from fxcalib.modifiers.ties import UntiedWeights, untie
from fxcalib.patterns import names_of
from fxcalib.profiling import span


class SchemeModifier(Modifier):
    """A modifier that quantizes modules by compressed-tensors schemes.

    Between `attach` and its own `commit` a module computes as if nothing was attached, so statistics are of
    unquantized computations. From then on its weight is on the grid of its scheme and its activations are quantized
    as at inference; the status `DECOMPRESSED` tells compressed-tensors not to quantize the weight in every forward.
    """

    def __init__(
        self,
        *,
        targets: str | Sequence[str] = "Linear",
        scheme: str | Mapping[str, Any] | QuantizationScheme | None = None,
        config_groups: Mapping[str, Any] | None = None,
        ignore: str | Sequence[str] | None = None,
        group_size: int | None = None,
        weight_observer: str | None = None,
        input_observer: str | None = None,
        output_observer: str | None = None,
        observer: str | Mapping[str, str] | None = None,
        kv_cache_scheme: object = None,
        sequential_targets: str | Sequence[str] | None = None,
    ) -> None:
        asked = None if sequential_targets is None else names_of(sequential_targets, "sequential target")
        self.sequential_targets = asked
        cached = read_kv_cache_scheme(kv_cache_scheme)
        self._cache = None if cached is None else KeyValueCache(cached)
        observers = _observers(observer, weight_observer, input_observer, output_observer)
        cache_alone = cached is not None and scheme is None and config_groups is None
        self._schemes = [] if cache_alone else build_schemes(targets, scheme, config_groups, group_size, observers)
        self._ignore = None if ignore is None else names_of(ignore, "ignore pattern")
        self._resolved: dict[str, QuantizationScheme] = {}
        self._unchecked: set[str] = set()
        self._committed: set[str] = set()
        self._inputs: dict[str, InputStatistics] = {}
        self._outputs: dict[str, Range] = {}
        self._fused = FusedInputs()
        self._global_scales = SharedGlobalScales()
        self._untied = UntiedWeights()

    observes_originals = False
    """Whether the inputs that modules have in the original model are held against theirs."""

    @abstractmethod
    def needs_hessian(self, scheme: QuantizationScheme) -> bool:
        """Whether the second moments of the inputs of modules with this scheme are to be collected."""

    @abstractmethod
    def commit_weights(self, scope: Scope, names: Sequence[str]) -> list[ModuleResult]:
        """Quantize the weights of these modules of the scope and store their parameters; one result for each."""

    @property
    def needs_data(self) -> bool:
        return self._cache_needs_data or any(self._observes(scheme) for scheme in self._schemes)

    @property
    def needs(self) -> Needs:
        observed = frozenset(name for name, scheme in self._resolved.items() if self._observes(scheme))
        moments = frozenset(name for name in observed if self.needs_hessian(self._resolved[name]))
        originals = moments if self.observes_originals else frozenset[str]()
        cached = frozenset[str]() if self._cache is None else self._cache.modules
        return Needs(
            observed=observed | (cached if self._cache_needs_data else frozenset()),
            committed=cached.union(self._resolved),
            originals=originals,
        )

    @property
    def _cache_needs_data(self) -> bool:
        return self._cache is not None and self._cache.needs_data

    @property
    def schemes(self) -> tuple[QuantizationScheme, ...]:
        """The schemes asked for, each with its targets."""
        return tuple(self._schemes)

    def resolve(self, model: nn.Module) -> dict[str, QuantizationScheme]:
        """Scheme of each module that it quantizes, by qualified name; raises what `schemes.resolve` raises."""
        if self._schemes:
            return resolve(model, self._schemes, self._ignore)
        refuse_quantized(model)
        return {}

    def attach(self, model: nn.Module) -> None:
        resolved = self.resolve(model)
        modules = {name: model.get_submodule(name) for name in resolved}
        for name, module in modules.items():
            check_finite(name, module)
        self._unchecked = {name for name, module in modules.items() if _weight(module).is_meta}
        self._resolved = resolved
        self._committed = set()
        self._untied = untie(model, resolved)
        self._global_scales = SharedGlobalScales()
        for name, scheme in resolved.items():
            initialize_module_for_quantization(modules[name], scheme, force_zero_point=False)
            modules[name].quantization_enabled = False  # type: ignore[assignment]
        if self._cache is not None:
            self._cache.attach(model)

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        with nullcontext() if self._cache is None else self._cache.observe(scope), self._observe_modules(scope):
            yield

    @contextmanager
    def _observe_modules(self, scope: Scope) -> Iterator[None]:
        shared, originals = SharedInputs(), OriginalInputs()
        outputs: dict[str, Range] = {}
        checks: list[tuple[int, str, Tensor]] = []
        handles: list[RemovableHandle] = []
        try:
            for name in self._pending(scope):
                scheme = self._resolved[name]
                if self._observes_inputs(scheme):
                    handles.append(self._observe_inputs(name, scheme, scope, shared, originals))
                if scheme.output_activations is not None and qargs.is_static(scheme.output_activations):
                    outputs[name] = qargs.range_of(scheme.output_activations)
                    handles.append(self._observe_outputs(name, scope, outputs[name], checks))
            yield
        finally:
            for handle in handles:
                handle.remove()
        with span("statistics"):
            groups = shared.finish()
            refuse_non_finite(groups, checks)
        self._inputs = {name: statistics for names, statistics in groups for name in names}
        self._outputs = outputs

    def commit(self, scope: Scope) -> list[ModuleResult]:
        names = self._pending(scope)
        for name in names:
            if name in self._unchecked:
                check_finite(name, scope.modules[name])
        notes = {name: self._commit_activations(name, scope.modules[name]) for name in names}
        scales, unshared = self._global_scales.find(scope, names, self._resolved, self._inputs)
        for name, scale in scales.items():
            store(scope.modules[name], "weight_global_scale", scale)
        for name, note in unshared.items():
            notes[name] = (*notes[name], note)
        results = {result.name: result for result in self.commit_weights(scope, names)}
        for name in names:
            module = scope.modules[name]
            module.quantization_status = QuantizationStatus.DECOMPRESSED
            del module.quantization_enabled
        self._fused.replace([(scope.modules[n], self._resolved[n], self._inputs.get(n)) for n in names])
        self._committed.update(names)
        self._inputs, self._outputs = {}, {}
        cached = [] if self._cache is None else self._cache.commit(scope)
        return [*(_with_notes(results[name], notes[name]) for name in names), *cached]

    def detach(self, model: nn.Module) -> None:
        self._fused.restore()
        for name in self._resolved.keys() - self._committed:
            module = model.get_submodule(name)
            QuantizationMetadata.clear_quantization(module)
            for attribute in ("quantization_status", "quantization_enabled"):
                if hasattr(module, attribute):
                    delattr(module, attribute)
        self._untied.tie_again(model, self._resolved.keys() - self._committed)
        if self._cache is not None:
            self._cache.detach(model)
        self._inputs, self._outputs, self._resolved, self._committed = {}, {}, {}, set()

    def statistics_of(self, name: str) -> InputStatistics | None:
        """What was observed of the module's inputs; the same object for modules that shared them all."""
        return self._inputs.get(name)

    def scheme_of(self, name: str) -> QuantizationScheme:
        """The scheme attached to a module."""
        return self._resolved[name]

    def _pending(self, scope: Scope) -> list[str]:
        return [name for name in scope.modules if name in self._resolved and name not in self._committed]

    def _observes_inputs(self, scheme: QuantizationScheme) -> bool:
        return self.needs_hessian(scheme) or qargs.is_static(scheme.input_activations)

    def _observes(self, scheme: QuantizationScheme) -> bool:
        return self._observes_inputs(scheme) or qargs.is_static(scheme.output_activations)

    def _observe_inputs(
        self, name: str, scheme: QuantizationScheme, scope: Scope, shared: SharedInputs, originals: OriginalInputs
    ) -> RemovableHandle:
        hessian = self.needs_hessian(scheme)
        args = scheme.input_activations if qargs.is_static(scheme.input_activations) else None
        recipe: Hashable = (hessian, None if args is None else qargs.range_key(args))

        shifted = hessian and self.observes_originals

        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = positional[0] if positional else keywords.get("input")
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not inputs.numel():
                return
            if scope.batch.original:
                if shifted:
                    originals.keep(name, inputs, scope.batch.index)
                return

            def make() -> InputStatistics:
                return InputStatistics(
                    Hessian(inputs.shape[-1], inputs.device) if hessian else None,
                    None if args is None else qargs.range_of(args),
                    InputShift(inputs.shape[-1], inputs.device) if shifted else None,
                )

            with span("statistics"):
                original = originals.take(name, scope.batch.index) if shifted else None
                shared.see(name, recipe, make, inputs, real_rows(inputs, scope.batch), scope.batch.index, original)

        return scope.modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    def _observe_outputs(
        self, name: str, scope: Scope, statistic: Range, checks: list[tuple[int, str, Tensor]]
    ) -> RemovableHandle:
        def hook(module: nn.Module, positional: tuple[Any, ...], output: Tensor) -> None:
            if not output.numel() or scope.batch.original:
                return
            with span("statistics"):
                statistic.add(output.detach(), real_rows(output, scope.batch))
                low, high = statistic.extremes()
                checks.append((scope.batch.index, name, (high - low).sum()))

        return scope.modules[name].register_forward_hook(hook)

    def _commit_activations(self, name: str, module: nn.Module) -> tuple[str, ...]:
        """Store the static scales of a module's inputs and outputs; what could not be calibrated is noted."""
        scheme = self._resolved[name]
        notes: list[str] = []
        for role, args, statistic in (
            ("input", scheme.input_activations, self._inputs.get(name, InputStatistics()).range),
            ("output", scheme.output_activations, self._outputs.get(name)),
        ):
            if args is None or not qargs.is_static(args):
                continue
            if statistic is None or not _has_values(statistic):
                statistic = union_of_extremes(list(self._inputs.values())) or _unit_range(module)
                notes.append(f"no batch reached it: its {role} scale covers what the modules around it were given")
            low, high = statistic.extremes()
            global_scale = qargs.global_scale_of(args, low.min(), high.max())
            if global_scale is not None:
                store(module, f"{role}_global_scale", global_scale)
                continue
            scales = qargs.scale_format_of(args, _weight(module).dtype, None)
            scale, zero_point = statistic.qparams(qargs.grid_of(args), scales)
            store(module, f"{role}_scale", scale)
            if zero_point is not None:
                store(module, f"{role}_zero_point", zero_point)
        return tuple(notes)


def store(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a quantization parameter in the dtype and shape it was attached with, on the device of the weight."""
    attached = getattr(module, name)
    value = value.reshape(attached.shape) if value.numel() == attached.numel() else value.expand(attached.shape)
    value = value.to(device=_weight(module).device, dtype=attached.dtype).contiguous()
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _observers(
    observer: str | Mapping[str, str] | None,
    weight: str | None,
    inputs: str | None,
    output: str | None,
) -> dict[str, str | None]:
    """Observer of each role: one name stands for the weights, a mapping for any of `weights`, `input`, `output`."""
    chosen: dict[str, str | None] = {"weights": None, "input_activations": None, "output_activations": None}
    roles = {"weights": "weights", "weight": "weights", "input": "input_activations", "output": "output_activations"}
    if observer is not None and not isinstance(observer, (str, Mapping)):
        raise OptionError(f"observer is {observer!r}; give a name, such as 'mse', or a dict of roles to names")
    named = {"weights": observer} if isinstance(observer, str) else dict(observer or {})
    for role, name in named.items():
        if role not in roles:
            raise OptionError(f"observer of {role!r}: choose from weights, input, output")
        chosen[roles[role]] = name
    for key, given in (("weights", weight), ("input_activations", inputs), ("output_activations", output)):
        chosen[key] = given if given is not None else chosen[key]
        if chosen[key] is not None and not isinstance(chosen[key], str):
            raise OptionError(f"observer of {key} is {chosen[key]!r}; give a name, such as 'mse'")
    return chosen


def real_rows(values: Tensor, batch: CurrentBatch) -> Tensor | None:
    """Which of the values' rows are real tokens, in their leading shape; None where none is known to be padding."""
    mask = batch.token_mask
    if mask is None:
        return None
    if values.shape[:-1] == mask.shape:
        return mask.to(values.device)
    if values.dim() == 2 and values.shape[0] == mask.numel():
        return mask.reshape(-1).to(values.device)
    return None


def _has_values(statistic: Range) -> bool:
    try:
        statistic.extremes()
    except ValueError:
        return False
    return True


def _unit_range(module: nn.Module) -> MinMax:
    statistic = MinMax()
    statistic.add(torch.tensor([-1.0, 1.0], device=_weight(module).device), None)
    return statistic


def refuse_non_finite(groups: list[tuple[list[str], InputStatistics]], checks: list[tuple[int, str, Tensor]]) -> None:
    """Raise for the earliest batch, and in it the module that ran first, whose values were not finite."""
    found: list[tuple[int, int, str, str]] = []
    for order, (names, statistics) in enumerate(groups):
        batch = statistics.first_bad_batch()
        if batch is not None:
            found.append((batch, order, names[0], "input"))
    for order, (batch, name, check) in enumerate(checks):
        if not bool(torch.isfinite(check)):
            found.append((batch, len(groups) + order, name, "output"))
            break
    if found:
        batch, _, name, what = min(found)
        raise NonFiniteActivationError(
            f"the {what} of module {name!r} holds NaN or infinity in batch {batch}; "
            "check that batch's data, or run the model in a dtype with more range (bfloat16 or float32)"
        )


def _with_notes(result: ModuleResult, notes: tuple[str, ...]) -> ModuleResult:
    if not notes:
        return result
    return ModuleResult(
        result.name, result.scheme, result.error, result.measure, result.seconds, (*result.notes, *notes)
    )


def elapsed(since: float) -> float:
    """Seconds since `since`, a value of `time.perf_counter`."""
    return time.perf_counter() - since
