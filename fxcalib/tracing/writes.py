"""Writes in place: a value depends on its inputs, and on what was written to their memory, also through views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxcalib.tracing.graph import is_call
from fxcalib.tracing.structure import flatten
from fxcalib.tracing.torch_private import StorageWeakRef

Calls = Mapping[fx.Node, list[fx.Node]]
"""Calls of modules and wrapped functions that write to arguments or to the module's buffers -> the nodes of these."""


def storages(node: fx.Node) -> set[Any]:
    """The memory that the value of `node` lies in."""
    tensors = [v for v in flatten(node.meta.get("val"))[0] if isinstance(v, torch.Tensor)]
    return {StorageWeakRef(t.untyped_storage()) for t in tensors}  # type: ignore[no-untyped-call]


def written_by(node: fx.Node, calls: Calls) -> list[fx.Node]:
    """The nodes whose values `node` writes to."""
    if is_call(node):
        return calls.get(node, [])
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        schema = node.target._schema.arguments
        named = {a.name: value for a, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
        written = [named.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
        return [w for w in written if isinstance(w, fx.Node)]
    return []


def writers(nodes: Iterable[fx.Node], calls: Calls) -> dict[fx.Node, set[Any]]:
    """The nodes that write in place, in order -> the memory that they write to."""
    found = {node: written_by(node, calls) for node in nodes}
    return {node: {s for w in written for s in storages(w)} for node, written in found.items() if written}


def last_writer(nodes: Iterable[fx.Node], writers: Mapping[fx.Node, set[Any]]) -> fx.Node | None:
    """The last of `writers` that writes to the memory of `nodes`."""
    memory = {s for node in nodes for s in storages(node)}
    return next((w for w in reversed(list(writers)) if writers[w] & memory), None)


def sources(node: fx.Node, writers: Mapping[fx.Node, set[Any]]) -> list[fx.Node]:
    """What the value of `node` depends on: inputs, what it comes after, and earlier writes to the inputs' memory."""
    direct = [*node.all_input_nodes, *node.meta.get("after", ())]
    if not writers:
        return direct
    memory = {s for source in node.all_input_nodes for s in storages(source)}
    return [*direct, *(w for w, written in writers.items() if w < node and written & memory)]
