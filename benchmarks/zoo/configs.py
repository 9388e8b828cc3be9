"""The tiny config of an architecture: shrunk by rule, then corrected for its family."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from transformers import CONFIG_MAPPING, PretrainedConfig

from benchmarks.zoo.shrinking import Config, shrink


class _Dropped:
    """The type of `DROP`."""


DROP: Final = _Dropped()
"""As a value in a correction: the key is taken out, so that the config class derives it."""

Correction = Mapping[str, Any] | Callable[[Config], Config]
"""Values merged into a shrunk config, or a function of it."""


def merge(config: Config, correction: Mapping[str, Any]) -> Config:
    """Merge `correction` into `config` in place, nested values key by key; returns it."""
    for key, value in correction.items():
        if value is DROP:
            config.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = dict(value) if isinstance(value, Mapping) else value
    return config


def corrected(config: Config, correction: Correction) -> Config:
    """`config` with one correction applied."""
    return merge(config, correction) if isinstance(correction, Mapping) else correction(config)


def config_class(model_type: str) -> Any:
    """The config class of `model_type`, whose arguments only it knows."""
    return CONFIG_MAPPING[model_type]


def tiny_config(model_type: str, class_name: str | None = None) -> PretrainedConfig:
    """The tiny config of `model_type`, with the corrections of its family and of the model class."""
    from benchmarks.zoo.families import CONFIGS, FACTORIES

    if model_type in FACTORIES:
        return FACTORIES[model_type]()
    made_of = config_class(model_type)
    values = shrink(made_of().to_dict())
    for name in (model_type, class_name):
        if name is not None and name in CONFIGS:
            values = corrected(values, CONFIGS[name])
    values.pop("model_type", None)
    made: PretrainedConfig = made_of(**values)
    return made


def config_for(model_type: str, model_class: Any) -> PretrainedConfig:
    """The tiny config that `model_class` takes: where a mapping lists the class of a part, the part's."""
    config = tiny_config(model_type, model_class.__name__)
    wanted = model_class.config_class
    if wanted is not None and not isinstance(config, wanted):
        config = next((part for part in parts(config) if isinstance(part, wanted)), config)
    fit_rope_sections(config, model_class)
    return config


def parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """`config` and all configs within it."""
    found: list[PretrainedConfig] = []
    stack = [config]
    while stack:
        current = stack.pop()
        if not any(current is other for other in found):
            found.append(current)
            stack += [value for value in vars(current).values() if isinstance(value, PretrainedConfig)]
    return found


def fit_rope_sections(config: PretrainedConfig, model_class: Any) -> None:
    """Make the sections of multimodal rotary embeddings add up to half the rotary dimension of the tiny heads."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    if "mrope_section" not in source and config.model_type != "glm46v":
        return
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    if rope.get("rope_type") == "ernie_3d" or any(isinstance(value, dict) for value in rope.values()):
        return
    if not hasattr(text, "hidden_size"):
        return
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    share = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    half = int(head_dim * share) // 2
    if sum(rope.get("mrope_section") or [0]) != half:
        quarter = max(half // 4, 0)
        text.rope_parameters = {**rope, "mrope_section": [half - 2 * quarter, quarter, quarter]}
