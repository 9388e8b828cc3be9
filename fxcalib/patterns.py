"""Names, class names and `re:` patterns that a user gives to choose modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fxcalib.errors import OptionError, TargetError

PREFIX = "re:"


def names_of(given: object, what: str) -> list[str]:
    """`given`, one name or pattern or several of them, as a list; `what` names the option in messages.

    Raises:
        OptionError: `given` is something else.
        TargetError: a `re:` pattern that is no regular expression.
    """
    if isinstance(given, str):
        names: list[object] = [given]
    elif isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        names = list(given)
    else:
        raise OptionError(f"{what} is {given!r}; give a name, a class name or an 're:' pattern, or a list of them")
    for name in names:
        if not isinstance(name, str):
            raise OptionError(
                f"{what} holds {name!r}, a {type(name).__name__}; each must be a name or an 're:' pattern"
            )
        if name.startswith(PREFIX):
            _compile(name, what)
    return [name for name in names if isinstance(name, str)]


def targets_of(given: object) -> tuple[str, ...] | None:
    """Sequential targets that a user gives, as a tuple; None where the model is to decide. Raises as `names_of`."""
    return None if given is None else tuple(names_of(given, "sequential target"))


def _compile(pattern: str, what: str) -> None:
    try:
        re.compile(pattern.removeprefix(PREFIX))
    except re.error as error:
        where = "" if error.pos is None else f" at character {error.pos + 1}"
        raise TargetError(
            f"{what} {pattern!r} is no regular expression: {error.msg}{where} behind {PREFIX!r}; "
            "write special characters with a backslash, as in 're:.*layers\\.0\\..*'"
        ) from error
