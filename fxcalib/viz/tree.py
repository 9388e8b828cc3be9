"""The module tree of a model that cannot be traced, with the place where the trace stopped."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from types import TracebackType

from torch import nn

from fxcalib.tracing import TraceError, resolve_targets
from fxcalib.tracing.errors import source_of_error
from fxcalib.viz.describe import parameter_count, short_source, weight_bytes
from fxcalib.viz.view import TreeNode, TreeView


def describe_failure(
    model: nn.Module, error: TraceError, targets: list[str] | None = None, *, name: str | None = None
) -> TreeView:
    """The modules of `model`, siblings of the same structure as one, and the module in whose forward `error` rose."""
    names = {id(module): path for path, module in model.named_modules()}
    failing = _failing(error, names)
    resolved = frozenset(resolve_targets(model, targets).names)
    source = next((s for e in reversed(_chain(error)) if (s := source_of_error(e)) != "no line of the model"), "")
    nodes = list(_nodes(model, "", 0, 1, failing, resolved))
    reason = re.sub(r"\S*site-packages/", "", str(error))
    return TreeView(name or type(model).__name__, type(model).__name__, reason, short_source(source), tuple(nodes))


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _failing(error: BaseException, names: dict[int, str]) -> str:
    """The innermost module of the model whose method was running when the trace stopped."""
    for link in reversed(_chain(error)):
        found = [names[id(owner)] for owner in _owners(link.__traceback__) if id(owner) in names]
        if found:
            return found[-1]
    return ""


def _owners(traceback: TracebackType | None) -> Iterator[object]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals.get("self")
        traceback = traceback.tb_next


def _nodes(
    module: nn.Module, name: str, depth: int, count: int, failing: str, targets: frozenset[str]
) -> Iterator[TreeNode]:
    yield TreeNode(
        name=name,
        type=type(module).__name__,
        depth=depth,
        count=count,
        parameters=parameter_count([module]),
        bytes=weight_bytes([module]),
        target=name in targets,
        failing=name == failing,
    )
    for child, path, repeats in _children(module, name, failing):
        yield from _nodes(child, path, depth + 1, repeats, failing, targets)


def _children(module: nn.Module, name: str, failing: str) -> Iterator[tuple[nn.Module, str, int]]:
    """Children with their names; neighbours that look the same are one, unless the failing module is in there."""
    groups: list[tuple[nn.Module, str, int, Hashable]] = []
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        holds = failing == path or failing.startswith(f"{path}.")
        look: Hashable = path if holds else _structure(child)
        if groups and groups[-1][3] == look:
            first, first_path, repeats, _ = groups[-1]
            groups[-1] = (first, first_path, repeats + 1, look)
        else:
            groups.append((child, path, 1, look))
    for child, path, repeats, _ in groups:
        yield child, path, repeats


def _structure(module: nn.Module) -> Hashable:
    own = tuple(tuple(p.shape) for p in module.parameters(recurse=False))
    return type(module).__name__, own, tuple((key, _structure(child)) for key, child in module.named_children())
