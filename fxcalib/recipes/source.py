"""A recipe's text as plain values, with the line that each of them stands on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fxcalib.errors import RecipeError

Keys = tuple[str | int, ...]
"""Way to a value: keys of mappings and positions in lists, from the outermost."""

_DEEPEST = 64


@dataclass(frozen=True)
class Source:
    """What a recipe says."""

    name: str
    """Of the file, or `recipe` where it came as text or a dict."""
    content: Any
    """Mappings, lists, text, numbers, truth values and None."""
    lines: Mapping[Keys, int] = field(default_factory=dict)
    """Way to a value -> its line, from 1; empty where there was no text."""

    def error(self, keys: Keys, message: str) -> RecipeError:
        """An error in the value at `keys`: file and line, keys, message."""
        line = next((self.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.lines), None)
        place = self.name if line is None else f"{self.name}:{line}"
        return RecipeError(": ".join([place, *([".".join(map(str, keys))] if keys else []), message]))


def read(recipe: str | Path | Mapping[str, Any] | list[Any]) -> Source:
    """The content of a recipe: a file's name, the text itself, or what such a text stands for.

    Raises:
        RecipeError: there is no such file, it cannot be read, or it is no YAML or JSON.
    """
    if isinstance(recipe, (Mapping, list)):
        return Source("recipe", recipe)
    if not isinstance(recipe, (str, Path)):
        raise RecipeError(f"recipe is {recipe!r}, a {type(recipe).__name__}; give a file, its text or a dict")
    if isinstance(recipe, str) and ("\n" in recipe or (":" in recipe and not Path(recipe).exists())):
        return parse(recipe, "recipe")
    path = Path(recipe).expanduser()
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(recipe))
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error.strerror}; give a YAML file") from error


def parse(text: str, name: str) -> Source:
    """The content of a recipe's text; `name` names it in messages.

    Raises:
        RecipeError: it is no YAML or JSON, or holds a key twice; with the line.
    """
    lines: dict[Keys, int] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        content = None if node is None else _value(loader, node, (), lines, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise RecipeError(f"{name}{line}: this is no YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: this is no YAML: {error}") from error
    finally:
        loader.dispose()
    return Source(name, content, lines)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 as everybody reads it, but with numbers such as 1e-3, which it takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _value(loader: Any, node: Any, keys: Keys, lines: dict[Keys, int], name: str) -> Any:
    lines.setdefault(keys, node.start_mark.line + 1)
    if len(keys) > _DEEPEST:
        raise RecipeError(f"{name}:{lines[keys]}: more than {_DEEPEST} values inside of each other")
    if node.tag.startswith("!"):
        raise RecipeError(f"{name}:{lines[keys]}: the tag {node.tag} has no meaning; write {node.tag[1:]}: {{...}}")
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*keys, i), lines, name) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    _refuse_twice(loader, node, keys, name)
    loader.flatten_mapping(node)
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        inner = (*keys, str(key))
        lines[inner] = key_node.start_mark.line + 1
        values[key] = _value(loader, value_node, inner, lines, name)
    return values


def _refuse_twice(loader: Any, node: Any, keys: Keys, name: str) -> None:
    first: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{name}:{key_node.start_mark.line + 1}: a key must be a name")
        line = key_node.start_mark.line + 1
        if key_node.value in first:
            raise Source(name, None, {(*keys, key_node.value): line}).error(
                (*keys, key_node.value),
                f"this key is in line {first[key_node.value]} already, and only one of them would count; "
                "a second modifier of the same class goes into a group of its own (..._modifiers)",
            )
        first[key_node.value] = line
