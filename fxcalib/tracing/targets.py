"""Which modules are the sequential targets of a model, and which modules lie above them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compressed_tensors.utils import match_named_modules
from torch import nn

from fxcalib.errors import TargetError, nearest
from fxcalib.patterns import names_of


@dataclass(frozen=True)
class Targets:
    """The resolved sequential targets of one model.

    `names` are the outermost matching modules in module order; a target inside of another target is part of it.
    `ancestors` are the modules whose own `forward` is traced through: all that contain a target.
    """

    patterns: tuple[str, ...]
    ignore: tuple[str, ...]
    names: tuple[str, ...]
    ancestors: frozenset[str]


def default_targets(model: nn.Module) -> list[str]:
    """Class names to use as targets where the user named none.

    The model's `_no_split_modules` that occur in it, else the class of its largest repeated layer stack: the
    `nn.ModuleList` or `nn.Sequential` whose members, two or more of one class, hold the most parameters. A model
    without such a stack has the direct children of its root as targets.
    """
    present = {type(module).__name__ for module in model.modules()}
    declared = [name for name in sorted(getattr(model, "_no_split_modules", None) or ()) if name in present]
    if declared:
        return declared
    best, most = None, 0
    for module in model.modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        name, count = Counter(type(child).__name__ for child in module).most_common(1)[0] if len(module) else ("", 0)
        size = sum(p.numel() for child in module if type(child).__name__ == name for p in child.parameters())
        if count >= 2 and size > most:
            best, most = name, size
    if best is not None:
        return [best]
    return sorted({type(child).__name__ for child in model.children()})


def resolve_targets(model: nn.Module, patterns: str | Sequence[str] | None, ignore: Sequence[str] = ()) -> Targets:
    """Match `patterns` (class names, module names or `re:` expressions, as compressed-tensors matches them).

    What lies in a module that `ignore` matches is no target, so that this module stays whole.

    Raises:
        TargetError: a pattern matches no module, or only the root; the message lists the nearest names.
    """
    whole = {name for pattern in ignore for name in _matches(model, pattern, "ignored module")}
    wanted = default_targets(model) if patterns is None else names_of(patterns, "sequential target")
    if not wanted:
        why = "the model has no submodules" if patterns is None else "the list is empty; leave it out for the layers"
        raise TargetError(f"no sequential targets: {why}, or name a class of modules or a module")
    matched: set[str] = set()
    for pattern in wanted:
        matched |= _matches(model, pattern, "sequential target")
    matched = {name for name in matched if name not in whole and not any(p in whole for p in _parents(name))}
    if not matched:
        raise TargetError(f"all sequential targets {', '.join(wanted)} lie in ignored modules {', '.join(ignore)}")
    outermost = tuple(
        name for name, _ in model.named_modules() if name in matched and not any(p in matched for p in _parents(name))
    )
    ancestors = frozenset({""} | {parent for name in outermost for parent in _parents(name)})
    return Targets(tuple(wanted), tuple(ignore), outermost, ancestors)


def _matches(model: nn.Module, pattern: str, role: str) -> set[str]:
    matched = {name for name, _ in match_named_modules(model, [pattern])}
    found = matched - {""}
    if not found:
        if matched:
            inside = ", ".join(default_targets(model)) or "one of its modules"
            raise TargetError(
                f"{role} {pattern!r} matches only the whole model, which cannot be cut at itself; name modules in it, "
                f"such as {inside}, or use pipeline='basic' to run it whole"
            )
        classes = {type(m).__name__ for m in model.children() for m in m.modules()}
        names = {n for n, _ in model.named_modules() if n}
        close = nearest(pattern.removeprefix("re:"), classes if "." not in pattern else names)
        raise TargetError(f"{role} {pattern!r} matches no module of {type(model).__name__}: {close}")
    return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
