"""SmoothQuant: outliers of activations moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxcalib.errors import OptionError
from fxcalib.mappings import ChannelMapping
from fxcalib.math.smoothing import largest_along, largest_by_channel, smoothquant_scales
from fxcalib.modifiers.base import Scope
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.smoothing import SmoothingModifier


class ChannelMaxima(InputStatistics):
    """The largest magnitude of each channel of an input."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.largest_I = torch.zeros(width, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor, real: Tensor | None, batch: int, original: Tensor | None = None) -> None:
        if real is not None:
            inputs = torch.where(real[..., None], inputs, 0.0)
        low, high = torch.aminmax(inputs.reshape(-1, inputs.shape[-1]), dim=0)
        self.largest_I = torch.maximum(self.largest_I, torch.maximum(-low, high).float())
        self.batches.append(batch)
        self.checks.append(self.largest_I.sum())

    def clone(self) -> ChannelMaxima:
        copy = ChannelMaxima(0, self.largest_I.device)
        copy.largest_I = self.largest_I.clone()
        copy.batches, copy.checks = list(self.batches), list(self.checks)
        return copy


class SmoothQuantModifier(SmoothingModifier):
    """Divide channels of activations by factors that the weights which read them are multiplied by.

    Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models". It
    quantizes nothing itself: give it before a modifier that does, as in
    `[SmoothQuantModifier(), GPTQModifier(scheme="W8A8")]`.

    Args:
        smoothing_strength: how much of the activations' range moves into the weights, 0 to 1 (alpha of the paper).
        mappings: what is smoothed, each [[balance layers], smooth layer]; None for what a trace of the model shows,
            norms whose channels only go to linear modules.
        ignore: smooth layers (names, classes or `re:` patterns) to leave alone.
        num_calibration_steps: how many batches to observe; None for all.
        calibration_function: None; llm-compressor's recipes name it.

    Raises:
        OptionError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        smoothing_strength: float = 0.5,
        mappings: object = None,
        ignore: str | Sequence[str] | None = None,
        num_calibration_steps: int | None = None,
        calibration_function: object = None,
    ) -> None:
        super().__init__(mappings, ignore)
        if isinstance(smoothing_strength, bool) or not isinstance(smoothing_strength, (int, float)):
            raise OptionError(f"smoothing_strength is {smoothing_strength!r}; give a number from 0 to 1")
        if not 0 <= smoothing_strength <= 1:
            raise OptionError(f"smoothing_strength is {smoothing_strength}; it must be from 0 to 1, 0.5 is usual")
        limit = num_calibration_steps
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise OptionError(f"num_calibration_steps is {limit!r}; give a number of batches, at least 1, or None")
        if calibration_function is not None:
            raise OptionError(
                "calibration_function has no use here, as the pipeline runs the model: leave it out, and pass batches "
                "that hold what the forward is to be called with"
            )
        self._strength = smoothing_strength
        self.batches_observed = limit

    @property
    def label(self) -> str:
        return f"smoothed with strength {self._strength:g}"

    def suits(self, model: nn.Module, mapping: ChannelMapping) -> bool:
        return not isinstance(model.get_submodule(mapping.source), nn.Linear)

    def statistic(self, width: int, device: torch.device) -> InputStatistics:
        return ChannelMaxima(width, device)

    def scale_of(self, scope: Scope, mapping: ChannelMapping) -> tuple[Tensor | None, tuple[str, ...]]:
        channels = mapping.channels
        source = next(scope.modules[mapping.source].parameters())
        activation_C = torch.zeros(channels, device=source.device)
        weight_C = torch.zeros_like(activation_C)
        for reader in mapping.readers:
            index_I = reader.index(source.device)
            weight = scope.modules[reader.module].get_parameter(reader.parameter)
            largest_I = largest_along(weight.detach(), reader.axis).to(source.device)
            weight_C = torch.maximum(weight_C, largest_by_channel(largest_I, index_I, channels))
            if (statistics := self.statistics_of(reader.module)) is not None:
                assert isinstance(statistics, ChannelMaxima)
                seen_I = statistics.largest_I.to(source.device)
                activation_C = torch.maximum(activation_C, largest_by_channel(seen_I, index_I, channels))
        if not self._statistics:
            return None, ("no batch reached what reads it: left as it is",)
        return smoothquant_scales(activation_C, weight_C, self._strength), ()
