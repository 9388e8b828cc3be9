"""Words of the command line: lists of names behind one option, and dataclasses whose fields are options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from fxcalib.errors import OptionError

_MANY = ("--ignore", "--targets")


def gathered(arguments: list[str]) -> list[str]:
    """`arguments` in which an option of `_MANY` that is followed by several names is repeated for each of them.

    That is so behind MODEL, given first; before it, one word is the name, and the next is MODEL if it is a folder or
    has a slash, which no name of a module has.

    Raises:
        OptionError: a second word before MODEL that may be a name or MODEL.
    """
    rewritten: list[str] = []
    option, taken, positionals = "", 0, 0
    for argument in arguments:
        if argument.startswith("-"):
            option, taken = "" if "=" in argument else argument, 0
        elif option in _MANY and taken and positionals > 1:
            rewritten.append(option)
        elif option in _MANY and taken and not ("/" in argument or Path(argument).is_dir()):
            raise OptionError(
                f"{argument!r} behind {option} may be another name or MODEL, as MODEL does not come first; write "
                f"fxcalib {arguments[0]} MODEL {option} NAME NAME, or separate the names by commas"
            )
        elif option and not taken:
            taken = 1
        else:
            option, positionals = "", positionals + 1
        rewritten.append(argument)
    return rewritten


def names(values: list[str] | None) -> list[str] | None:
    """Names given one by one or separated by commas; a pattern is never split, as it may hold commas itself."""
    if values is None:
        return None
    return [name for value in values for name in ([value] if value.startswith("re:") else value.split(",")) if name]


def given(options: object) -> dict[str, Any]:
    """The fields of a dataclass of options that are not None, by name; names in them are split."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    split = {name: names(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in split.items() if value is not None}


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the fields of its dataclasses of options one by one, as typer wants them."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        fields = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=fields[f.name])
            for f in dataclasses.fields(groups[name])
        ]

    @functools.wraps(command)
    def taking_fields(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    taking_fields.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking_fields.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return taking_fields
