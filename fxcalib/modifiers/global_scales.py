"""One global scale for two-level weights (NVFP4) that an inference engine runs as one matrix.

q, k and v, or gate and up, read the same input, so engines stack their weights and multiply once, which leaves room
for one global scale: where the parts bring different ones, vLLM takes the largest and warns, and the weights of the
others come out wrong. The shared scale is that of the stacked weight, from the extremes of all parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from torch import Tensor, nn

from fxcalib.modifiers.base import Scope
from fxcalib.modifiers.qargs import global_scale_of

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Names that siblings have where engines stack them: transformers' names for what vLLM calls packed modules."""


class SharedGlobalScales:
    """The global scales given out so far: modules that belong together may be committed one after the other."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def find(
        self,
        scope: Scope,
        names: Sequence[str],
        schemes: Mapping[str, QuantizationScheme],
        statistics: Mapping[str, object],
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Global scale (1,) float32 of each of `names` that has one, and a note where it could not be shared.

        Args:
            scope: what is committed.
            names: modules of the scope.
            schemes: scheme of each module that is quantized in the whole model.
            statistics: what the inputs of modules gave; siblings with one object read the same tensor.
        """
        notes: dict[str, str] = {}
        for name in names:
            if name in self._known or not _two_level(schemes[name]):
                continue
            together = [name, *_siblings(name, schemes, statistics)]
            modules = {each: scope.model.get_submodule(each) for each in together if each not in self._known}
            loaded = {each: weight for each, module in modules.items() if not (weight := _weight(module)).is_meta}
            missing = sorted(modules.keys() - loaded.keys())
            if missing:
                notes[name] = f"its global scale is not that of {', '.join(missing)}, which was not loaded yet"
            ends = [end.float().cpu() for weight in loaded.values() for end in torch.aminmax(weight)]
            args = schemes[name].weights
            assert args is not None
            scale = global_scale_of(args, torch.stack(ends).amin(), torch.stack(ends).amax())
            assert scale is not None
            self._known.update(dict.fromkeys(loaded, scale))
        return {name: self._known[name].clone() for name in names if name in self._known}, notes


def _siblings(name: str, schemes: Mapping[str, QuantizationScheme], statistics: Mapping[str, object]) -> list[str]:
    """Modules of the same parent and weight arguments that engines stack with `name`, or that read the same tensor."""
    parent, _, own = name.rpartition(".")
    stacked = {part for group in FUSED if own in group for part in group}
    read = statistics.get(name)
    found = []
    for other, scheme in schemes.items():
        above, _, last = other.rpartition(".")
        if other == name or above != parent or scheme.weights != schemes[name].weights:
            continue
        if last in stacked or (read is not None and statistics.get(other) is read):
            found.append(other)
    return found


def _two_level(scheme: QuantizationScheme) -> bool:
    return scheme.weights is not None and scheme.weights.strategy == QuantizationStrategy.TENSOR_GROUP


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
