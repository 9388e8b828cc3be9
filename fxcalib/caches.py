"""Calibration needs no key-value cache: it would be filled, copied and carried for nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def takes_use_cache(model: nn.Module) -> bool:
    """Whether the model's forward takes `use_cache`: by name, or as a transformers model that hands keywords on."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return True
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    return any(hasattr(config, "use_cache") for config in (model.config, model.config.get_text_config()))


def without_cache(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """`batch`, with `use_cache=False` where the model takes that and the batch does not say otherwise."""
    if not isinstance(batch, Mapping) or "use_cache" in batch or not takes_use_cache(model):
        return batch
    return {**batch, "use_cache": False}
