"""Values of traced tensors on the real batch: glue recorded so far is run when the model branches on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxcalib.tracing.torch_private import DisablePythonDispatcher, unset_fake_temporarily

_UNKNOWN = object()


class RealPrefix:
    """Runs the recorded glue on real inputs, each node once, as far as it can be run without calling a module."""

    def __init__(self, graph: fx.Graph, inputs: Mapping[fx.Node, Any], attribute: Callable[[str], Any]) -> None:
        self._graph, self._attribute = graph, attribute
        self._known: dict[fx.Node, Any] = dict(inputs)
        self._last: fx.Node | None = None

    def truth(self, node: fx.Node) -> bool | None:
        """`bool` of the real value of `node`; None where it depends on a module's result or on values not at hand."""
        with unset_fake_temporarily(), DisablePythonDispatcher(), torch.no_grad():
            self._advance()
            value = self._known[node]
            return None if value is _UNKNOWN else bool(value)

    def _advance(self) -> None:
        node = self._last.next if self._last is not None else next(iter(self._graph.nodes))
        while node.op != "root":
            if node not in self._known:
                self._known[node] = self._run(node)
            self._last = node
            node = node.next

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = self._attribute(str(node.target))
            return _UNKNOWN if isinstance(value, torch.Tensor) and value.device.type == "meta" else value
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt) and size.node.hint is not None:
            return int(size.node.hint)  # known also where it is the size of a module's result
        if node.op != "call_function" or any(self._known[i] is _UNKNOWN for i in node.all_input_nodes):
            return _UNKNOWN
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._known[n])
        assert callable(node.target)
        return node.target(*args, **kwargs)
