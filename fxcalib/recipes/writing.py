"""From modifiers to a recipe that fxcalib and llm-compressor read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import BaseModel
from torch import nn

from fxcalib.errors import RecipeError
from fxcalib.modifiers import Modifier
from fxcalib.modifiers.scheme_modifier import SchemeModifier
from fxcalib.modifiers.schemes import ignored_patterns
from fxcalib.recipes.registry import LLM_COMPRESSOR_NAMES, parameters, quantizer_of, spares_output_head

_OBSERVERS = ("observer", "weight_observer", "input_observer", "output_observer")


def dump_recipe(modifiers: Sequence[Modifier], model: nn.Module) -> str:
    """The recipe that makes `modifiers`, as YAML; `model` says what they ignore where that was left to them.

    A group size, and schemes given as values, are written as `config_groups`, which llm-compressor has as well.

    Raises:
        RecipeError: an argument, of a modifier of one's own say, that cannot be written as text.
    """
    groups: list[dict[str, Any]] = [{}]
    for modifier in modifiers:
        name = LLM_COMPRESSOR_NAMES.get(type(modifier).__name__, type(modifier).__name__)
        if name in groups[-1]:  # a mapping holds each class once
            groups.append({})
        groups[-1][name] = settings_of(modifier, model)
    named = {f"default{'' if i == 0 else f'_{i}'}_modifiers": group for i, group in enumerate(groups)}
    text: str = yaml.dump(
        {"default_stage": named},
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
    return text


def settings_of(modifier: Modifier, model: nn.Module) -> dict[str, Any]:
    """Arguments that make a modifier which does the same to `model`, as plain values; defaults are left out.

    Raises:
        RecipeError: an argument that has no plain value.
    """
    arguments = {**modifier.arguments}
    takes = parameters(type(modifier))
    quantizer = quantizer_of(modifier)
    if quantizer is not None:
        arguments = _scheme_arguments(quantizer, arguments)
    spares_head = spares_output_head(type(modifier), arguments)
    if spares_head:
        arguments["ignore"] = ignored_patterns(model, arguments.pop("ignore", None))
    name = type(modifier).__name__
    return {
        key: _plain(value, f"{key} of {name}")
        for key, value in arguments.items()
        if (key == "ignore" and spares_head) or key not in takes or value != takes[key].default
    }


def _scheme_arguments(modifier: SchemeModifier, arguments: dict[str, Any]) -> dict[str, Any]:
    scheme, targets = arguments.get("scheme"), arguments.get("targets")
    presets = isinstance(scheme, Mapping) and all(str(key).upper() in PRESET_SCHEMES for key in scheme)
    named = isinstance(scheme, str) or presets or not modifier.schemes
    if named and arguments.get("group_size") is None:
        first: dict[str, Any] = {"targets": [targets]} if isinstance(targets, str) else {}
        observer = arguments.get("observer")
        if isinstance(observer, str):
            del arguments["observer"]
            first["weight_observer"] = arguments.get("weight_observer") or observer
        return {**arguments, **first}
    groups = {f"group_{i}": _scheme(each) for i, each in enumerate(modifier.schemes)}
    dropped = ("scheme", "targets", "group_size", *_OBSERVERS)
    return {
        "config_groups": groups,
        **{k: v for k, v in arguments.items() if k not in dropped and k != "config_groups"},
    }


def _scheme(scheme: QuantizationScheme) -> dict[str, Any]:
    roles = scheme.model_dump(mode="json")
    return {role: _given(value) if isinstance(value, dict) else value for role, value in roles.items() if value}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None and value != {}}


def _plain(value: object, what: str) -> Any:
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, BaseModel):
        return _given(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, what)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, what) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner, what) for inner in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    raise RecipeError(f"{what} is {value!r}, a {type(value).__name__}, which cannot be written as text")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Without anchors: equal values are written out wherever they stand."""

    def ignore_aliases(self, data: object) -> bool:
        return True
