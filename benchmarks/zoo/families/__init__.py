"""Corrections for single families: of their tiny configs, and of what they take as inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PretrainedConfig

from benchmarks.zoo.configs import Correction
from benchmarks.zoo.families import audio, composed, images, text, vision_language, vision_language_more
from benchmarks.zoo.inputs import Builder

_MODULES = (text, composed, images, audio, vision_language, vision_language_more)

CONFIGS: Mapping[str, Correction] = {key: value for module in _MODULES for key, value in module.CONFIGS.items()}
"""Model type or class name -> correction of the shrunk config."""

FACTORIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    key: value for module in (text, composed) for key, value in module.FACTORIES.items()
}
"""Model type -> its config, where that is not a shrunk default."""

INPUTS: Mapping[str, Builder] = {key: value for module in _MODULES for key, value in module.INPUTS.items()}
"""`category/model_type`, class name or model type -> builder of its batches; looked up in this order."""
