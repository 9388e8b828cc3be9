"""From a recipe to modifiers, in the format of llm-compressor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, overload

from torch import nn

from fxcalib.errors import OptionError, RecipeError, TargetError, nearest
from fxcalib.modifiers import Modifier
from fxcalib.modifiers.scheme_modifier import SchemeModifier
from fxcalib.recipes.registry import DEFAULT_ONLY, INERT, modifier_classes, parameters, quantizer_of, spares_output_head
from fxcalib.recipes.source import Keys, Source, read

_STAGE, _GROUP = "_stage", "_modifiers"
_SHAPE = "write the modifiers as quant_stage: quant_modifiers: GPTQModifier: {scheme: W4A16}"


@dataclass(frozen=True)
class Entry:
    """One modifier of a recipe."""

    name: str
    """Its class."""
    arguments: Mapping[str, Any]
    keys: Keys
    """Where it stands."""


class Recipe(Sequence[Modifier]):
    """The modifiers of a recipe, in order, which know where they were written."""

    def __init__(self, source: Source, entries: Sequence[Entry], modifiers: Sequence[Modifier]) -> None:
        self._source, self._entries, self._modifiers = source, tuple(entries), tuple(modifiers)
        self._refuse_same_targets()

    @property
    def name(self) -> str:
        """Of its file, or `recipe`."""
        return self._source.name

    @overload
    def __getitem__(self, index: int) -> Modifier: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Modifier]: ...

    def __getitem__(self, index: int | slice) -> Modifier | Sequence[Modifier]:
        return self._modifiers[index]

    def __len__(self) -> int:
        return len(self._modifiers)

    def refuse_conflicts(self, model: nn.Module) -> None:
        """Hold the recipe against a model.

        Raises:
            RecipeError: two modifiers quantize the same module, or a target matches none.
        """
        owners: dict[str, Entry] = {}
        for entry, modifier in self._quantizing():
            try:
                names = list(modifier.resolve(model))
            except (OptionError, TargetError) as error:
                raise self._source.error(culprit(entry, str(error)), str(error)) from error
            for name in names:
                if name in owners:
                    raise self._conflict(owners[name], entry, f"module {name!r}")
            owners.update(dict.fromkeys(names, entry))

    def _quantizing(self) -> list[tuple[Entry, SchemeModifier]]:
        pairs = zip(self._entries, map(quantizer_of, self._modifiers), strict=True)
        return [(entry, quantizer) for entry, quantizer in pairs if quantizer is not None]

    def _refuse_same_targets(self) -> None:
        for (first, one), (second, other) in combinations(self._quantizing(), 2):
            shared = {t for s in one.schemes for t in s.targets} & {t for s in other.schemes for t in s.targets}
            if shared and one.arguments.get("ignore") == other.arguments.get("ignore"):
                raise self._conflict(first, second, f"target {min(shared)!r}")

    def _conflict(self, first: Entry, second: Entry, what: str) -> RecipeError:
        before = self._source.lines.get(first.keys)
        where = ".".join(map(str, first.keys)) + ("" if before is None else f" (line {before})")
        return self._source.error(
            second.keys, f"{what} is quantized by {where} already; give each its own targets, or ignore some in one"
        )


def load_recipe(recipe: str | Path | Mapping[str, Any] | list[Any]) -> Recipe:
    """The modifiers of a recipe of llm-compressor, to be given to `calibrate` or `quantize`.

    Modifiers stand under their class names, in groups (`..._modifiers`) of stages (`..._stage`); groups without a stage
    and a list of modifiers are read as well. The modifiers of all stages make one run, in the order in which they
    stand, as in llm-compressor 0.14, which has no `eval(...)` of arguments any more either. Where `ignore` is left out,
    nothing is ignored: `lm_head` is named in most recipes.

    Args:
        recipe: a YAML or JSON file, its text, or what such a text stands for.

    Raises:
        RecipeError: it cannot be read, names a modifier or an argument that does not exist, or a value that cannot
            work; with file, line and key.
    """
    source = read(recipe)
    entries = list(_entries(source))
    if not entries:
        raise source.error((), f"there is no modifier in it; {_SHAPE}")
    return Recipe(source, entries, [_modifier(source, entry) for entry in entries])


def culprit(entry: Entry, message: str) -> Keys:
    """The innermost key of a modifier that a message about it names, or whose value; its own where there is none."""
    text = message.partition("; ")[0].replace("_", " ")  # the rest is what to do about it
    found = entry.keys
    for keys, value in _inner(entry.arguments, entry.keys):
        by_key = re.search(rf"\b{re.escape(keys[-1].replace('_', ' '))}\b", text)
        values = value if isinstance(value, list) else [value]
        by_value = any(isinstance(each, str) and repr(each).replace("_", " ") in text for each in values)
        if (by_key or by_value) and len(keys) > len(found):
            found = keys
    return found


def _inner(value: object, keys: Keys) -> Iterator[tuple[tuple[Any, ...], object]]:
    """All values in mappings in a value, with their keys."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (*keys, str(key)), inner
            yield from _inner(inner, (*keys, str(key)))


def _entries(source: Source) -> Iterator[Entry]:
    content = source.content
    if isinstance(content, list):
        yield from _group(source, content, ())
        return
    if not isinstance(content, Mapping):
        raise source.error((), f"a recipe is a mapping of stages, and this is {_kind(content)}; {_SHAPE}")
    for key, value in content.items():
        if key == "args":
            continue
        if _ends(key, _STAGE):
            if not isinstance(value, Mapping):
                raise source.error((key,), f"a stage is a mapping of groups, and this is {_kind(value)}; {_SHAPE}")
            for group, members in value.items():
                if not _ends(group, _GROUP):
                    raise source.error((key, str(group)), _unknown(group, "group in a stage", ["quant_modifiers"]))
                yield from _group(source, members, (key, group))
        elif _ends(key, _GROUP):
            yield from _group(source, value, (key,))
        else:
            raise source.error((str(key),), _unknown(key, "key of a recipe", ["quant_stage", "quant_modifiers"]))


def _group(source: Source, members: object, keys: Keys) -> Iterator[Entry]:
    """The modifiers of a group: a mapping of class names to arguments, or a list of such mappings."""
    if isinstance(members, list):
        for position, member in enumerate(members):
            yield from _group(source, {member: None} if isinstance(member, str) else member, (*keys, position))
        return
    if not isinstance(members, Mapping):
        raise source.error(keys, f"a group is a mapping of modifiers, and this is {_kind(members)}; {_SHAPE}")
    for name, arguments in members.items():
        own = (*keys, str(name))
        given = {} if arguments is None else arguments
        if not isinstance(given, Mapping):
            raise source.error(own, f"its arguments are {_kind(given)}, where a mapping of names to values is expected")
        yield Entry(str(name), given, own)


def _modifier(source: Source, entry: Entry) -> Modifier:
    classes = modifier_classes()
    cls = classes.get(entry.name)
    if cls is None:
        raise source.error(entry.keys, f"there is no modifier {entry.name!r}: {nearest(entry.name, classes)}")
    takes = parameters(cls)
    arguments: dict[str, Any] = {}
    for key, value in entry.arguments.items():
        own = (*entry.keys, str(key))
        _refuse_evaluation(source, value, own)
        if key in takes:
            arguments[key] = value
        elif key in DEFAULT_ONLY and value not in (None, DEFAULT_ONLY[key]):
            raise source.error(own, f"{key} is {value!r}, and fxcalib has nothing of that kind; leave it out")
        elif key not in INERT and key not in DEFAULT_ONLY:
            raise source.error(own, f"{entry.name} has no argument {str(key)!r}: {nearest(str(key), takes)}")
    if spares_output_head(cls, arguments):
        arguments.setdefault("ignore", [])
    try:
        return cls(**arguments)
    except (OptionError, TargetError, TypeError, ValueError) as error:
        raise source.error(culprit(entry, str(error)), str(error)) from error


def _refuse_evaluation(source: Source, value: object, keys: Keys) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_evaluation(source, inner, (*keys, str(key)))
    elif isinstance(value, str) and re.match(r"eval\(", value):
        raise source.error(keys, f"{value!r} is not evaluated, as recipes hold values only; write the value itself")


def _ends(key: object, ending: str) -> bool:
    return isinstance(key, str) and (key.endswith(ending) or key == ending[1:])


def _unknown(key: object, what: str, usual: list[str]) -> str:
    return f"there is no {what} of this name: stages end in {_STAGE!r} and groups in {_GROUP!r}: " + (
        nearest(str(key), usual)
    )


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
