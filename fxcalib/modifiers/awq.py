"""AWQ: weights of salient input channels scaled up before they are quantized, and clipped, for least output error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from fxcalib.errors import OptionError
from fxcalib.mappings import ChannelMapping, Reader
from fxcalib.math.awq import awq_scales, clip_groups, output_error, relative_magnitude
from fxcalib.math.hessian import Hessian
from fxcalib.math.qparams import QParams, minmax_qparams
from fxcalib.math.smoothing import factors_of_reader, keep, sum_by_channel
from fxcalib.modifiers.base import ModuleResult, Needs, Scope
from fxcalib.modifiers.qargs import OBSERVERS, describe, granularity_of, is_static
from fxcalib.modifiers.scheme_modifier import SchemeModifier, elapsed
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.smoothing import SmoothingModifier
from fxcalib.modifiers.weights import IMPORTANCE, WeightFormat, quantize_rows, round_to_nearest, shared_global_scale

DuoScaling = bool | Literal["both"]


class AWQModifier(SmoothingModifier):
    """Scale the input channels of weights by what their activations say of their importance, before quantization.

    Lin et al. 2023, "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration". The
    scales of each mapping are those of the candidates that leave the least error in the outputs of the weights that
    read it, which the second moments of their inputs tell without running the data again. With a `scheme` the weights
    are then quantized, each group's range clipped for least output error; without one only the scales are moved, for
    the modifier that comes after it, as in `[AWQModifier(), GPTQModifier(scheme="W4A16")]`.

    Args:
        mappings: what is scaled, each a dict of `smooth_layer` and `balance_layers` (see `AWQMapping`); None for what
            a trace of the model shows.
        duo_scaling: whether scales depend on the weights as well as on the activations; `both` tries either.
        n_grid: how many strengths are tried.
        offload_device: changes nothing, as no activations are kept; llm-compressor's recipes name it.
        clip: whether the ranges of weights in groups are clipped for least output error; only with a `scheme`.
        scheme, config_groups, targets, ignore, group_size, ...: as `QuantizationModifier` has them; `ignore` names
            modules that are not quantized.

    Raises:
        OptionError: an argument out of its range; static scales of activations, which need a modifier of their own.
    """

    def __init__(
        self,
        *,
        mappings: object = None,
        duo_scaling: DuoScaling = True,
        n_grid: int = 20,
        clip: bool = True,
        offload_device: object = None,
        targets: str | Sequence[str] = "Linear",
        scheme: str | Mapping[str, Any] | QuantizationScheme | None = None,
        config_groups: Mapping[str, Any] | None = None,
        ignore: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(mappings)
        if duo_scaling not in (True, False, "both"):
            raise OptionError(f"duo_scaling is {duo_scaling!r}; give True, False or 'both'")
        if isinstance(n_grid, bool) or not isinstance(n_grid, int) or n_grid < 1:
            raise OptionError(f"n_grid {n_grid!r} must be a whole number of candidates, at least 1")
        self._duo_scaling: DuoScaling = duo_scaling
        self._n_grid = n_grid
        self._informed: list[nn.Module] = []
        """Modules that know how much their input channels count, for a modifier that rounds them to nearest."""
        self._quantizer: _ClippingQuantizer | None = None
        if scheme is not None or config_groups is not None:
            quantizer = _ClippingQuantizer(
                clip=clip, targets=targets, scheme=scheme, config_groups=config_groups, ignore=ignore, **settings
            )
            self._quantizer = quantizer
            self.sequential_targets = quantizer.sequential_targets
        elif ignore is not None or settings:
            named = ", ".join(["ignore"] * (ignore is not None) + list(settings))
            raise OptionError(f"{named} without a scheme: give it to the modifier that quantizes, or a scheme here")

    @property
    def quantizer(self) -> SchemeModifier | None:
        """What quantizes the scaled weights; None without a scheme."""
        return self._quantizer

    @property
    def label(self) -> str:
        return "scaled for its readers"

    @property
    def needs(self) -> Needs:
        own = super().needs
        if self._quantizer is None:
            return own
        other = self._quantizer.needs
        return Needs(own.observed | other.observed, own.committed | other.committed)

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self._quantizer is not None:
            self._quantizer.attach(model)

    def prepare(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> None:
        if not any(_weights_of(module) is not None for module in model.modules()):
            raise OptionError(
                "AWQModifier has no scheme, and no other modifier is to quantize weights: the scales would be for "
                "nothing. Give a scheme, or a modifier that quantizes after it"
            )
        super().prepare(model, batch, device)

    def suits(self, model: nn.Module, mapping: ChannelMapping) -> bool:
        return any(_weights_of(model.get_submodule(reader.module)) is not None for reader in mapping.readers)

    def statistic(self, width: int, device: torch.device) -> InputStatistics:
        return InputStatistics(Hessian(width, device))

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        with ExitStack() as stack:
            if self._quantizer is not None:
                stack.enter_context(self._quantizer.observe(scope))
            stack.enter_context(super().observe(scope))
            yield

    def commit(self, scope: Scope) -> list[ModuleResult]:
        results = super().commit(scope)
        return results if self._quantizer is None else [*results, *self._quantizer.commit(scope)]

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        for module in self._informed:
            module.__dict__.pop(IMPORTANCE, None)
        self._informed = []
        if self._quantizer is not None:
            self._quantizer.detach(model)

    def statistics_of(self, name: str) -> InputStatistics | None:
        quantized = None if self._quantizer is None else self._quantizer.statistics_of(name)
        return super().statistics_of(name) if quantized is None else quantized

    def _observed(self, mapping: ChannelMapping) -> list[str]:
        if self._quantizer is None:
            return super()._observed(mapping)
        # the quantizer observes the modules that it quantizes, and no others count
        return [] if mapping.observed is None else [mapping.observed]

    def fold(self, scope: Scope, mapping: ChannelMapping, scale_C: Tensor) -> None:
        super().fold(scope, mapping, scale_C)
        for reader in mapping.readers:
            factor_I = factors_of_reader(scale_C, reader.index(scale_C.device))
            if self._quantizer is not None:
                self._quantizer.scaled(reader.module, factor_I)
            elif (statistics := self.statistics_of(reader.module)) is not None and statistics.hessian is not None:
                module = scope.modules[reader.module]
                known_I = getattr(module, IMPORTANCE, statistics.hessian.sum_II.diagonal())
                setattr(module, IMPORTANCE, known_I / factor_I.square())
                self._informed.append(module)

    def scale_of(self, scope: Scope, mapping: ChannelMapping) -> tuple[Tensor | None, tuple[str, ...]]:
        weighed = [w for r in mapping.readers if (w := self._weighed(scope, r)) is not None]
        if not weighed:
            return None, ("no batch reached what reads it: left as it is",)
        channels = mapping.channels
        activation_C = self._activations(scope, mapping, weighed, channels)
        weight_C = _mean_weights(weighed, channels)
        best_C = torch.ones_like(activation_C)
        least = _error(weighed, best_C)
        for ratio, duo in self._candidates():
            scale_C = keep(awq_scales(activation_C, weight_C if duo else None, ratio), mapping.kept)
            error = _error(weighed, scale_C)
            better = error < least
            best_C, least = torch.where(better, scale_C, best_C), torch.minimum(error, least)
        return best_C, ()

    def _candidates(self) -> list[tuple[float, bool]]:
        kinds = [False, True] if self._duo_scaling == "both" else [bool(self._duo_scaling)]
        count = max(self._n_grid // len(kinds), 1)
        return [(step / count, duo) for duo in kinds for step in range(count)]

    def _weighed(self, scope: Scope, reader: Reader) -> _Weighed | None:
        module = scope.modules[reader.module]
        args, statistics = _weights_of(module), self.statistics_of(reader.module)
        if args is None or statistics is None or statistics.hessian is None:
            return None
        assert isinstance(module.weight, Tensor)
        weight_OI = module.weight.detach()
        return _Weighed(weight_OI, args, statistics.hessian, reader.index(weight_OI.device))

    def _activations(self, scope: Scope, mapping: ChannelMapping, weighed: Sequence[_Weighed], channels: int) -> Tensor:
        """Root mean square of each channel of the source over all that was read of it, (C,)."""
        device = weighed[0].weight_OI.device
        hook = None if mapping.observed is None else super().statistics_of(mapping.observed)
        if hook is not None and hook.hessian is not None and len(hook.hessian.sum_II) == channels:
            return hook.hessian.sum_II.diagonal().sqrt().to(device)
        squares_C, count_C = torch.zeros(channels, device=device), torch.zeros(channels, device=device)
        for each in {id(w.hessian): w for w in weighed}.values():
            squares_I = each.hessian.sum_II.diagonal()
            squares_C += sum_by_channel(squares_I, each.index_I, channels)
            count_C += each.hessian.tokens * sum_by_channel(torch.ones_like(squares_I), each.index_I, channels)
        return (squares_C / count_C.clamp(min=1)).sqrt()


class _Weighed:
    """A weight that reads a mapping and is to be quantized, with the second moments of its inputs."""

    def __init__(self, weight_OI: Tensor, args: QuantizationArgs, hessian: Hessian, index_I: Tensor) -> None:
        self.weight_OI, self._dtype, self._args = weight_OI.float(), weight_OI.dtype, args
        self.hessian, self._hessian_II, self.index_I = hessian, hessian.full(), index_I

    def magnitude(self) -> Tensor:
        """Mean magnitude of each input channel relative to its group, (I,)."""
        granularity = granularity_of(self._args)
        width = granularity.columns if granularity.strategy == "group" else self.weight_OI.shape[1]
        return relative_magnitude(self.weight_OI, width)

    def error(self, scale_C: Tensor) -> Tensor:
        """Squared error of the outputs if the weight is quantized with its input channels scaled, 0-dim."""
        factor_I = factors_of_reader(scale_C, self.index_I)
        scaled_OI = (self.weight_OI * factor_I).to(self._dtype)
        form = WeightFormat.of(scaled_OI, self._args)
        found = minmax_qparams(form.granularity.table(scaled_OI), form.grid, form.scales)
        shape = form.granularity.shape(scaled_OI.shape)
        zero_point = None if found.zero_point is None else found.zero_point.reshape(shape)
        quantized_OI = quantize_rows(scaled_OI, form, QParams(found.scale.reshape(shape), zero_point))
        return output_error(quantized_OI.div_(factor_I).sub_(self.weight_OI), self._hessian_II)


def _error(weighed: Sequence[_Weighed], scale_C: Tensor) -> Tensor:
    return torch.stack([each.error(scale_C) for each in weighed]).sum()


def _mean_weights(weighed: Sequence[_Weighed], channels: int) -> Tensor:
    """Mean relative magnitude of the weights that read each channel of a source, (C,)."""
    device = weighed[0].weight_OI.device
    sum_C, count_C = torch.zeros(channels, device=device), torch.zeros(channels, device=device)
    for each in weighed:
        rows = each.weight_OI.shape[0]
        sum_C += rows * sum_by_channel(each.magnitude(), each.index_I, channels)
        count_C += rows * sum_by_channel(torch.ones_like(each.weight_OI[0]), each.index_I, channels)
    return sum_C / count_C.clamp(min=1)


def _weights_of(module: nn.Module) -> QuantizationArgs | None:
    """How a module's weight is to be quantized; None where it is not."""
    scheme = getattr(module, "quantization_scheme", None)
    weights: QuantizationArgs | None = getattr(scheme, "weights", None)
    return weights


class _ClippingQuantizer(SchemeModifier):
    """Rounds weights to nearest in ranges that are clipped for least output error."""

    def __init__(self, *, clip: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._clip = clip
        self._factors: dict[str, Tensor] = {}
        for scheme in self._schemes:
            if is_static(scheme.input_activations) or is_static(scheme.output_activations):
                raise OptionError(
                    "AWQModifier cannot calibrate static activations, whose ranges change with the scales: use "
                    "[AWQModifier(), QuantizationModifier(scheme=...)], which observes them after that"
                )

    def needs_hessian(self, scheme: QuantizationScheme) -> bool:
        return scheme.weights is not None

    def scaled(self, name: str, factor_I: Tensor) -> None:
        """The input channels of a module's weight were multiplied by `factor_I` and its inputs divided by it."""
        self._factors[name] = self._factors.get(name, torch.ones_like(factor_I)) * factor_I

    def commit_weights(self, scope: Scope, names: Sequence[str]) -> list[ModuleResult]:
        results = []
        for name in names:
            began = time.perf_counter()
            scheme = self.scheme_of(name)
            error, measure, notes = self._quantize(name, scope.modules[name], scheme.weights)
            results.append(ModuleResult(name, describe(scheme), error, measure, elapsed(began), notes))
        return results

    def _quantize(
        self, name: str, module: nn.Module, args: QuantizationArgs | None
    ) -> tuple[float | None, str, tuple[str, ...]]:
        """Relative error, what it is relative to, and notes."""
        if args is None:
            return None, "weight", ()
        statistics = self.statistics_of(name)
        if statistics is None or statistics.hessian is None:
            why = "no calibration batch reached it"
            if isinstance(module, nn.Embedding):
                why = "an embedding has no inputs to calibrate on"
            return float(round_to_nearest(module, args)), "weight", (f"rounded to nearest: {why}",)
        hessian_II = statistics.hessian.full()
        factor_I = self._factors.pop(name, None)
        if factor_I is not None:
            factor_I = factor_I.to(hessian_II.device)
            hessian_II = hessian_II / factor_I[:, None] / factor_I
        assert isinstance(module.weight, Tensor)
        weight_OI = module.weight.detach()
        weight_format = WeightFormat.of(weight_OI, args, shared_global_scale(module))
        granularity = weight_format.granularity
        if self._clip and granularity.strategy == "group" and OBSERVERS.get(args.observer or "mse") == "mse":
            found = clip_groups(weight_OI, hessian_II, granularity.columns, weight_format.grid, weight_format.scales)
        else:
            found = weight_format.search(weight_OI, hessian_II.diagonal())
        quantized_OI = quantize_rows(weight_OI, weight_format, found)
        error = output_error(quantized_OI - weight_OI.float(), hessian_II)
        energy = output_error(weight_OI.float(), hessian_II).clamp(min=1e-30)
        weight_format.write(module, quantized_OI, found)
        return float(error / energy), "output", ()
