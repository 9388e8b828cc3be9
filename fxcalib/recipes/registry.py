"""Which modifiers there are, by class name, and which arguments each of them takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import fxcalib.modifiers
from fxcalib.modifiers import AWQModifier, MagnitudePruningModifier, Modifier
from fxcalib.modifiers.scheme_modifier import SchemeModifier
from fxcalib.modifiers.sparsity_modifier import SparsityModifier

INERT = frozenset(
    {
        *("index", "group", "start", "end", "update", "initialized", "finalized"),
        *("requires_calibration_data", "batched_quantization", "sequential_update"),
        *("offload_hessians", "offload_device", "update_scheduler", "scheduler_args"),
    }
)
"""Arguments of llm-compressor that say when and where it computes, not what; read over where fxcalib has none."""

DEFAULT_ONLY = {
    "bypass_divisibility_checks": False,
    "algorithm": "smoothquant",
    "leave_enabled": False,
    "apply_globally": False,
}
"""Arguments of llm-compressor that fxcalib has for one value only."""


LLM_COMPRESSOR_NAMES = {"WandaModifier": "WandaPruningModifier"}
"""Class name -> what llm-compressor calls it, and so recipes, where that differs."""


def modifier_classes() -> dict[str, type[Modifier]]:
    """Name -> class: all that `fxcalib.modifiers` exports, also as llm-compressor calls it, and what users defined."""
    found: dict[str, type[Modifier]] = {}
    pending = list(Modifier.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending.extend(cls.__subclasses__())
        own = cls.__module__.startswith("fxcalib.")
        if not inspect.isabstract(cls) and (not own or cls.__name__ in fxcalib.modifiers.__all__):
            found[cls.__name__] = cls
            found[LLM_COMPRESSOR_NAMES.get(cls.__name__, cls.__name__)] = cls
    return dict(sorted(found.items()))


def parameters(cls: type[Modifier]) -> dict[str, inspect.Parameter]:
    """Name -> keyword parameter of a modifier's constructor, those that it hands on to its bases included."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in own:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def quantizer_of(modifier: Modifier) -> SchemeModifier | None:
    """The part of a modifier that quantizes modules by schemes; None where it has none."""
    if isinstance(modifier, AWQModifier):
        return modifier.quantizer
    return modifier if isinstance(modifier, SchemeModifier) else None


def spares_output_head(cls: type[Modifier], arguments: Mapping[str, Any]) -> bool:
    """Whether a modifier made with `arguments` leaves the output head alone unless `ignore` says what to leave.

    Recipes say it, as llm-compressor would ignore nothing; its magnitude pruning has no such argument.
    """
    if issubclass(cls, MagnitudePruningModifier):
        return False
    quantizes = arguments.get("scheme") is not None or arguments.get("config_groups") is not None
    return issubclass(cls, (SchemeModifier, SparsityModifier)) or (issubclass(cls, AWQModifier) and quantizes)
