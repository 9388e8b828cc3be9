"""Mappings that a user gives by patterns, in the forms of llm-compressor's recipes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compressed_tensors.utils import match_named_modules
from torch import nn

from fxcalib.errors import OptionError, TargetError, nearest
from fxcalib.mappings.derivation import is_linear
from fxcalib.mappings.gains import gain_of
from fxcalib.mappings.mapping import ChannelMapping, Reader
from fxcalib.patterns import names_of

_FIELDS = ("smooth_layer", "balance_layers", "activation_hook_target")


@dataclass(frozen=True)
class AWQMapping:
    """The output channels of `smooth_layer` are the input channels of `balance_layers`; names or `re:` patterns."""

    smooth_layer: str
    balance_layers: Sequence[str]
    activation_hook_target: str | None = None
    """Module whose inputs tell how large the channels are, by its path below the closest module that holds all balance
    layers; None for the balance layers themselves."""


def parse(given: object) -> tuple[AWQMapping, ...] | None:
    """The mappings that a modifier's argument names; None for None.

    Each is a pair of balance layers and the smooth layer, a dict of `smooth_layer` and `balance_layers`, or an object
    with these attributes.

    Raises:
        OptionError: it names none.
        TargetError: a `re:` pattern that is no regular expression.
    """
    if given is None:
        return None
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise OptionError(f"mappings is {given!r}; give a list of mappings, or leave it out to have them derived")
    parsed = tuple(_parsed(each) for each in given)
    if not parsed:
        raise OptionError("mappings is empty, so nothing would be smoothed; leave it out to have them derived")
    return parsed


def _parsed(given: object) -> AWQMapping:
    if isinstance(given, Mapping):
        for key in given:
            if key not in _FIELDS:
                raise OptionError(f"a mapping has no field {key!r}: {nearest(str(key), _FIELDS)}")
        fields = dict(given)
    elif isinstance(given, (list, tuple)) and len(given) == 2:
        fields = {"balance_layers": given[0], "smooth_layer": given[1]}
    else:
        fields = {key: getattr(given, key, None) for key in _FIELDS}
    smooth, balance, hook = (fields.get(key) for key in _FIELDS)
    if not isinstance(smooth, str) or balance is None or not (hook is None or isinstance(hook, str)):
        raise OptionError(
            f"mapping {given!r} names no layers: give [balance layers, smooth layer], such as "
            "[['re:.*q_proj', 're:.*k_proj', 're:.*v_proj'], 're:.*input_layernorm'], "
            "or a dict of smooth_layer and balance_layers"
        )
    names_of(smooth, "smooth layer")
    return AWQMapping(smooth, tuple(names_of(balance, "balance layer")), hook)


def resolve(model: nn.Module, given: Sequence[AWQMapping]) -> tuple[ChannelMapping, ...]:
    """The modules of `model` that are meant. A balance layer belongs to the smooth layer that its name is closest to.

    Raises:
        TargetError: a pattern that matches nothing.
        OptionError: layers whose channels do not fit, or that cannot be scaled.
    """
    return tuple(mapping for each in given for mapping in _resolved(model, each))


def _resolved(model: nn.Module, given: AWQMapping) -> list[ChannelMapping]:
    smooth = _matches(model, given.smooth_layer, "smooth layer")
    balance = list(dict.fromkeys(n for p in given.balance_layers for n in _matches(model, p, "balance layer")))
    readers: dict[str, list[str]] = {}
    for name in balance:
        closeness = {source: len(_common(source, name)) for source in smooth if source != name}
        closest = [source for source, length in closeness.items() if length == max(closeness.values())]
        if len(closest) > 1:
            raise OptionError(
                f"balance layer {name!r} is as close to the smooth layer {closest[0]!r} as to {closest[1]!r}; "
                f"give a pattern more exact than {given.smooth_layer!r}"
            )
        for source in closest:
            readers.setdefault(source, []).append(name)
    found = (_mapping(model, source, names, given) for source, names in readers.items())
    return [mapping for mapping in found if mapping is not None]


def _mapping(model: nn.Module, source: str, readers: Sequence[str], given: AWQMapping) -> ChannelMapping | None:
    module = model.get_submodule(source)
    if isinstance(module, nn.Linear):
        channels, offsets = module.out_features, {name: 0.0 for name, _ in module.named_parameters()}
    else:
        gain = gain_of(module)
        if gain is None:
            raise OptionError(
                f"smooth layer {source!r} is a {type(module).__name__}, whose output channels no parameter scales; "
                "name a norm or a linear module"
            )
        channels, offsets = gain.channels, dict(gain.offsets)
    for name in readers:
        reader = model.get_submodule(name)
        if not isinstance(reader, nn.Linear) or not is_linear(reader):
            raise OptionError(f"balance layer {name!r} is a {type(reader).__name__}; name linear modules")
        if reader.in_features != channels:
            text = f"{source!r} has {channels} output channels and {name!r} {reader.in_features} input channels"
            if isinstance(module, nn.Linear):
                warnings.warn(
                    f"not smoothed: {text}; leave mappings out, and the channels of grouped heads are found",
                    stacklevel=2,
                )
                return None
            raise OptionError(f"{text}: the one cannot be balanced by the other")
    observed = None
    if given.activation_hook_target is not None:
        above = ".".join(_common_of(readers))
        observed = f"{above}.{given.activation_hook_target}" if above else given.activation_hook_target
        if observed not in dict(model.named_modules()):
            raise TargetError(f"activation_hook_target {given.activation_hook_target!r} is no module of {above!r}")
    balanced = tuple(Reader(name, "weight", 1, range(channels)) for name in readers)
    return ChannelMapping(source, channels, offsets, balanced, observed=observed)


def _matches(model: nn.Module, pattern: str, role: str) -> list[str]:
    found = [name for name, _ in match_named_modules(model, [pattern])]
    if not found:
        names = {name for name, _ in model.named_modules() if name}
        raise TargetError(f"{role} {pattern!r} matches no module: {nearest(pattern.removeprefix('re:'), names)}")
    return found


def _common(first: str, second: str) -> list[str]:
    """The leading parts that two names have in common."""
    parts = []
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return parts


def _common_of(names: Sequence[str]) -> list[str]:
    above = names[0].split(".")[:-1]
    for name in names[1:]:
        above = _common(".".join(above), name)
    return above
