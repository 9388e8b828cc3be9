"""Round-to-nearest quantization of weights, and static or dynamic quantization of activations."""

from __future__ import annotations

import time
from collections.abc import Sequence

from compressed_tensors.quantization import QuantizationScheme

from fxcalib.modifiers.base import ModuleResult, Scope
from fxcalib.modifiers.qargs import describe
from fxcalib.modifiers.scheme_modifier import SchemeModifier, elapsed
from fxcalib.modifiers.weights import round_to_nearest


class QuantizationModifier(SchemeModifier):
    """Quantize weights to the nearest codes, and activations as the scheme says.

    Weight scales are searched for the least squared error unless the scheme or `weight_observer` names another
    observer. Calibration data is needed for static activation scales only.

    Args:
        targets: module names, class names or `re:` patterns that `scheme` applies to.
        scheme: a preset of compressed-tensors in any case (`W4A16`, `W8A8`, `FP8`, ...), a dict of preset names to
            targets, or a dict of `weights`, `input_activations` and `output_activations`.
        config_groups: instead of `scheme`: group names to `QuantizationScheme`s or dicts, each with its `targets`.
        ignore: names, classes or patterns to leave alone; None ignores the output head. A head that is asked for and
            tied to the input embeddings gets a weight of its own.
        group_size: replaces the scheme's; -1 for one scale per output channel.
        weight_observer, input_observer, output_observer: `minmax`, `mse` or `percentile`.
        observer: the same for all weights (a name), or for `weights`, `input` and `output` (a mapping).
        kv_cache_scheme: how keys and values are cached, as `QuantizationArgs` or a dict of its fields, such as
            `{"num_bits": 8, "type": "float", "strategy": "tensor"}`; static scales are calibrated on what attention
            hands to its cache. It may be given without a `scheme`, and `ignore` does not apply to it.

    Raises:
        OptionError: arguments that contradict each other or name what does not exist.
    """

    def needs_hessian(self, scheme: QuantizationScheme) -> bool:
        weights = scheme.weights
        return weights is not None and weights.observer == "imatrix_mse"

    def commit_weights(self, scope: Scope, names: Sequence[str]) -> list[ModuleResult]:
        results = []
        for name in names:
            began = time.perf_counter()
            scheme = self.scheme_of(name)
            error: float | None = None
            notes: tuple[str, ...] = ()
            if scheme.weights is not None:
                statistics = self.statistics_of(name)
                hessian = None if statistics is None else statistics.hessian
                importance = None if hessian is None else hessian.sum_II.diagonal()
                error = float(round_to_nearest(scope.modules[name], scheme.weights, importance))
                if self.needs_hessian(scheme) and hessian is None:
                    notes = ("no batch reached it: all inputs weigh the same",)
            results.append(ModuleResult(name, describe(scheme), error, "weight", elapsed(began), notes))
        return results
