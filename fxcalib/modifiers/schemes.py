"""Which module is quantized how: presets, config groups, targets and ignore patterns to a scheme for each module.

Names and patterns match as compressed-tensors matches them: a module's name, `re:` and a pattern matched from the
start of the name, or the name of the module's class or one of its bases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import is_match, match_named_modules
from compressed_tensors.utils.match import match_targets
from torch import nn

from fxcalib.errors import AlreadyQuantizedError, NonFiniteWeightError, OptionError, TargetError, nearest
from fxcalib.math.finite import all_finite
from fxcalib.modifiers.formats import refuse_unstorable
from fxcalib.modifiers.qargs import default_observer
from fxcalib.modifiers.ties import is_embedding_tie
from fxcalib.patterns import names_of

QUANTIZABLE = (nn.Linear, nn.Embedding)
_SCHEME_KEYS = ("weights", "input_activations", "output_activations", "format")
_ROLES = ("weights", "input_activations", "output_activations")
_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_USUAL_GROUPS = (256, 128, 64, 32, 16, 8)


def build_schemes(
    targets: str | Sequence[str],
    scheme: str | Mapping[str, Any] | QuantizationScheme | None,
    config_groups: Mapping[str, Any] | None,
    group_size: int | None = None,
    observers: Mapping[str, str | None] | None = None,
) -> list[QuantizationScheme]:
    """The schemes that a modifier's arguments ask for, each with its own targets; no model is needed.

    Args:
        targets: names, classes or `re:` patterns, for a `scheme` that brings none.
        scheme: a preset's name in any case; a dict of preset names to targets; a dict of `weights`,
            `input_activations`, `output_activations`; or a scheme.
        config_groups: group names to schemes or dicts of their fields, or preset names to targets.
        group_size: replaces the group size of every scheme's weights.
        observers: replaces the observer of `weights`, `input_activations`, `output_activations` where not None.

    Raises:
        OptionError: neither or both of `scheme` and `config_groups`; an unknown preset, field or observer; a group
            size for a scheme without groups; a scheme that no checkpoint format holds; an argument of another type.
        TargetError: a `re:` pattern that is no regular expression.
    """
    target_list = names_of(targets, "target")
    if not target_list:
        raise OptionError("targets is empty, so nothing would be quantized; name modules or classes, such as 'Linear'")
    if (scheme is None) == (config_groups is None):
        raise OptionError("give either `scheme` (a preset such as 'W4A16') or `config_groups`, not both, not neither")
    labels = ["scheme"]
    if scheme is None:
        if not isinstance(config_groups, Mapping) or not config_groups:
            raise OptionError(f"config_groups is {config_groups!r}; give a dict of names to schemes, at least one")
        schemes = [_group_scheme(name, value, target_list) for name, value in config_groups.items()]
        labels = [f"config group {name!r}" for name in config_groups]
    elif isinstance(scheme, QuantizationScheme):
        schemes = [scheme.model_copy(deep=True)]
    elif isinstance(scheme, str):
        schemes = [_preset(scheme, target_list)]
        labels = [f"scheme {scheme!r}"]
    elif not isinstance(scheme, Mapping):
        raise OptionError(
            f"scheme is {scheme!r}; give a preset's name, such as 'W4A16', a dict or a QuantizationScheme"
        )
    elif scheme and all(str(key).upper() in PRESET_SCHEMES for key in scheme):
        schemes = [_preset(name, value) for name, value in scheme.items()]
        labels = [f"scheme {name!r}" for name in scheme]
    else:
        schemes = [_explicit("scheme", scheme, target_list)]
    owners: dict[str, int] = {}
    for number, each in enumerate(schemes):
        names_of(each.targets, "target")
        for target in each.targets:
            if owners.setdefault(target, number) != number:
                raise OptionError(f"target {target!r} is in two config groups; each target may have one scheme")
    for label, each in zip(labels, schemes, strict=True):
        if group_size is not None:
            _set_group_size(each, group_size)
        for role in _ROLES:
            args: QuantizationArgs | None = getattr(each, role)
            if args is not None:
                args.observer = (observers or {}).get(role) or args.observer or default_observer(role, args)
        refuse_unstorable(label, each)
    return schemes


def resolve(
    model: nn.Module, schemes: Sequence[QuantizationScheme], ignore: str | Sequence[str] | None = None
) -> dict[str, QuantizationScheme]:
    """Scheme of each module that is to be quantized, by qualified name in the order of the model.

    `ignore`: names, classes or `re:` patterns to leave alone; None: the output head, where there is one. Where several
    targets match a module, its exact name goes before patterns and those before classes, as compressed-tensors reads
    them back from a checkpoint.

    Raises:
        AlreadyQuantizedError: the model is quantized.
        TargetError: a target or ignore pattern that matches no module, or nothing is left to quantize.
        OptionError: a group size that does not divide a layer's width; a weight tied to one that is no embedding's;
            activations of an embedding; a module that another modifier quantizes.
    """
    refuse_quantized(model)
    names = dict(model.named_modules())
    ignored = ignored_patterns(model, ignore)
    owners = {target: scheme for scheme in schemes for target in scheme.targets}
    for target in owners:
        matched = [module for _, module in match_named_modules(model, [target])]
        if not matched:
            raise TargetError(f"target {target!r} matches no module: {suggest(target, model)}")
        if not any(isinstance(module, QUANTIZABLE) for module in matched):
            kinds = ", ".join(sorted({type(module).__name__ for module in matched}))
            raise TargetError(f"target {target!r} matches only {kinds}; Linear and Embedding modules can be quantized")
    resolved: dict[str, QuantizationScheme] = {}
    for name, module in match_named_modules(model, list(owners), ignored):
        if isinstance(module, QUANTIZABLE):
            scheme = owners[match_targets(name, module, list(owners))[0]]
            if any(getattr(scheme, role) is not None for role in _ROLES):
                resolved[name] = scheme
                refuse_quantized_module(name, module)
    if not resolved:
        raise TargetError(
            f"nothing to quantize: every module that {sorted(owners)} match is ignored by {ignored} or unquantized; "
            + _where_weights_are(model, set(ignored))
        )
    for name, scheme in resolved.items():
        module = names[name]
        if hasattr(module, "quantization_scheme"):
            raise OptionError(f"module {name!r} is quantized by another modifier too; give each its own targets")
        fixed_dtype = scheme.weights is not None and scheme.weights.scale_dtype is not None
        if fixed_dtype and module.weight.dtype != torch.bfloat16:
            dtype = str(module.weight.dtype).removeprefix("torch.")
            raise OptionError(
                f"module {name!r} is {dtype}, but the format of its scheme holds bfloat16; load the model in bfloat16"
            )
        if isinstance(module, nn.Embedding) and (scheme.input_activations or scheme.output_activations):
            raise OptionError(f"module {name!r} is an embedding: its weights can be quantized, not its activations")
    refuse_tied(model, [name for name in resolved if not is_embedding_tie(model, name)])
    _refuse_indivisible(names, resolved)
    return resolved


def ignored_patterns(model: nn.Module, ignore: str | Sequence[str] | None) -> list[str]:
    """What to leave alone, as names, classes or `re:` patterns: the output head for None.

    Raises:
        TargetError: a pattern that matches no module.
    """
    if ignore is None:
        return output_head(model)
    ignored = names_of(ignore, "ignore pattern")
    for pattern in ignored:
        if not _matches(model, pattern):
            raise TargetError(f"ignore pattern {pattern!r} matches no module: {suggest(pattern, model)}")
    return ignored


def check_finite(name: str, module: nn.Module) -> None:
    """Refuse a weight that holds NaN or infinity; waits for the device. Weights on the meta device pass.

    Raises:
        NonFiniteWeightError: naming the parameter.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.is_meta and not all_finite(weight.detach()):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise NonFiniteWeightError(
            f"parameter '{name}.weight' holds {bad} NaN or infinite values of {weight.numel()}; "
            "load a sound checkpoint or ignore the module"
        )


def _group_scheme(name: str, value: Any, targets: list[str]) -> QuantizationScheme:
    if isinstance(value, QuantizationScheme):
        return value.model_copy(deep=True)
    if isinstance(value, Mapping):
        return _explicit(f"config group {name!r}", value, targets)
    return _preset(name, value)


def _preset(name: str, targets: object) -> QuantizationScheme:
    if name.upper() not in PRESET_SCHEMES:
        raise OptionError(f"unknown scheme {name!r}: {nearest(name, PRESET_SCHEMES)}")
    return preset_name_to_scheme(name, names_of(targets, "target"))


def _explicit(what: str, fields: Mapping[str, Any], targets: list[str]) -> QuantizationScheme:
    for key in fields:
        if key not in (*_SCHEME_KEYS, "targets"):
            choices = [*_SCHEME_KEYS, "targets", *(PRESET_SCHEMES if what == "scheme" else ())]
            raise OptionError(f"{what} has no field {key!r}: {nearest(key, choices)}")
    try:
        return QuantizationScheme(**{"targets": targets, **deepcopy(dict(fields))})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise OptionError(f"{what} cannot be read: {error}") from error


def _set_group_size(scheme: QuantizationScheme, group_size: int) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise OptionError(f"group size {group_size!r} must be a whole number of columns, or -1 for one per channel")
    weights = scheme.weights
    if weights is None or weights.strategy != QuantizationStrategy.GROUP or weights.scale_dtype is not None:
        what = "has no weights"
        if weights is not None:
            what = f"quantizes weights per {QuantizationStrategy(weights.strategy).value}"
            what += "" if weights.scale_dtype is None else f" of {weights.group_size}, fixed by its format"
        raise OptionError(f"group size {group_size} does not apply: the scheme {what}")
    if group_size != -1 and group_size < 1:
        raise OptionError(f"group size {group_size} must be at least 1, or -1 for one scale per output channel")
    changed = {"group_size": None if group_size == -1 else group_size}
    strategy = QuantizationStrategy.CHANNEL if group_size == -1 else QuantizationStrategy.GROUP
    scheme.weights = weights.model_copy(update={**changed, "strategy": strategy.value})


def _matches(model: nn.Module, pattern: str) -> bool:
    return any(is_match(name, module, pattern) for name, module in model.named_modules())


def output_head(model: nn.Module) -> list[str]:
    """The name of the module that makes logits: what transformers calls the output embeddings, else `lm_head`."""
    names = dict(model.named_modules())
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    found = [name for name, module in names.items() if module is head and name]
    return found or (["lm_head"] if "lm_head" in names else [])


def unquantizable(model: nn.Module) -> dict[str, int]:
    """Parameters, by class of module, that are matrices or larger and in no module that can be quantized.

    Experts of a mixture that are one tensor, the `Conv1D` of GPT-2, convolutions: largest first.
    """
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QUANTIZABLE):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                kind = type(module).__name__
                counts[kind] = counts.get(kind, 0) + parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _where_weights_are(model: nn.Module, ignored: set[str]) -> str:
    """A next step where nothing is left to quantize."""
    other = unquantizable(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    if sum(other.values()) * 2 > total:
        shares = ", ".join(f"{kind} ({count / total:.0%})" for kind, count in list(other.items())[:3])
        return (
            f"most weights are in {shares}, and only Linear and Embedding modules can be quantized: "
            "use a version of the model that is made of Linear modules"
        )
    return f"name other targets, or ignore less than {sorted(ignored)}" if ignored else "name other targets"


def suggest(pattern: str, model: nn.Module) -> str:
    """A next step for a name or pattern that matches no module."""
    if pattern.startswith("re:"):
        return "a pattern is matched from the start of the module's name, such as 're:.*q_proj$'"
    classes = {type(module).__name__ for module in model.modules()}
    return nearest(pattern, classes | {name for name, _ in model.named_modules() if name})


def refuse_quantized(model: nn.Module) -> None:
    """Raise AlreadyQuantizedError for a model that was loaded with a quantization config."""
    config = getattr(model, "config", None)
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", None)
        raise AlreadyQuantizedError(
            f"the model is quantized already ({getattr(method, 'value', method)}); start from the original checkpoint"
        )


def refuse_quantized_module(name: str, module: nn.Module) -> None:
    """Raise AlreadyQuantizedError for a module that an earlier run has quantized."""
    status = getattr(module, "quantization_status", None)
    # Another modifier of the same run leaves its modules initialized until it commits them.
    if is_module_quantized(module) and status != QuantizationStatus.INITIALIZED:
        raise AlreadyQuantizedError(f"module {name!r} is quantized already; start from the original checkpoint")


def refuse_tied(model: nn.Module, resolved: Iterable[str]) -> None:
    """Raise OptionError for a module, among those of these names, whose weight another module has too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in resolved:
        module = model.get_submodule(name)
        others = [owner for owner in owners.get(id(module.weight), []) if owner != f"{name}.weight"]
        # One module under two names is no tie: it is quantized once.
        others = [owner for owner in others if model.get_submodule(owner.rpartition(".")[0]) is not module]
        if others:
            raise OptionError(
                f"the weight of {name!r} is tied to {', '.join(map(repr, others))}: a checkpoint holds it once, and "
                "changing one would change the other; ignore the module, or untie the weights first"
            )


def _refuse_indivisible(names: Mapping[str, nn.Module], resolved: Mapping[str, QuantizationScheme]) -> None:
    for role in ("weights", "input_activations"):
        by_size: dict[int, dict[str, int]] = {}
        for name, scheme in resolved.items():
            args: QuantizationArgs | None = getattr(scheme, role)
            size = 0
            if args is not None and args.strategy in _GROUPED:
                size = args.group_size or 0
            elif args is not None and args.strategy == QuantizationStrategy.BLOCK and args.block_structure:
                size = args.block_structure[1]
            weight = names[name].weight
            assert isinstance(weight, torch.Tensor)
            width = weight.shape[-1]
            if size and width % size:
                by_size.setdefault(size, {})[name] = width
        for size, layers in by_size.items():
            common = math.gcd(*layers.values())
            fitting = [str(group) for group in _USUAL_GROUPS if common % group == 0] or [str(common)]
            listed = ", ".join(f"{name} ({width})" for name, width in list(layers.items())[:4])
            more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
            raise OptionError(
                f"group size {size} of {role} does not divide the input width of {listed}{more}; "
                f"sizes that fit them: {', '.join(fitting)}; or ignore these modules"
            )
