"""What a checkpoint must say of experts that are one tensor in the model and one tensor for each expert on the disk.

transformers merges the weights of a mixture's experts into tensors that no Linear module holds, so they stay as they
are while the Linear modules around them are quantized; on the disk they are modules `experts.0`, ... again.
Readers go by the names on the disk and take those for Linear modules, which a target `Linear` in the config makes
quantized ones: vLLM, and transformers itself, which then drops each expert that has no packed weights.
"""

from __future__ import annotations

import re

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized
from torch import nn

EXPERTS = r"re:.*\.experts(\.|$)"
"""Matches the module that holds merged experts, and each of the experts on the disk; not `shared_experts`."""
GROUP = "experts_unquantized"
"""Comes before `group_0` where a config's keys are sorted: of the groups that name experts, readers take the first."""


def has_unquantized_experts(model: nn.Module) -> bool:
    """Whether `model` holds merged experts, which no module with a scheme is part of."""
    pattern = re.compile(EXPERTS.removeprefix("re:"))
    inside = [module for name, module in model.named_modules() if pattern.match(name)]
    merged = any(parameter.dim() >= 3 for module in inside for parameter in module.parameters(recurse=False))
    return merged and not any(is_module_quantized(module) for module in inside)


def leave_experts(config: QuantizationConfig) -> None:
    """Let `config` say that all experts are ignored, in the two ways that are read.

    `ignore` is what counts. transformers (5.15 to 5.24 at least) looks for a group that names experts instead and
    lets pass as they are only experts in 8-bit floats without scales; so there is such a group, all of it ignored.
    """
    config.ignore = [*(config.ignore or ()), EXPERTS]
    weights = QuantizationArgs(num_bits=8, type=QuantizationType.FLOAT, strategy=QuantizationStrategy.CHANNEL)
    config.config_groups = {GROUP: QuantizationScheme(targets=[EXPERTS], weights=weights), **config.config_groups}
