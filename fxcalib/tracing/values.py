"""Values of traced tensors on the real batch: what is recorded so far is run when the model asks for a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxcalib.tracing.graph import has_effect
from fxcalib.tracing.preserve import SavedTensors
from fxcalib.tracing.structure import flatten
from fxcalib.tracing.torch_private import DisablePythonDispatcher, unset_fake_temporarily
from fxcalib.tracing.writes import Calls, storages, written_by

UNKNOWN = object()
"""Stands for a value that is not at hand."""


class RealPrefix:
    """Runs the recorded graph on real inputs, each node once: glue at once, modules only when nothing else helps."""

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Callable[[], Mapping[fx.Node, Any]],
        attribute: Callable[[str], Any],
        call_module: Callable[[str, Any, Any], Any],
        writes: Calls,
        saved: SavedTensors,
    ) -> None:
        """`inputs()` makes the inputs anew: glue may write to them. `call_module(name, args, kwargs)` returns `UNKNOWN`
        where the module cannot be run, because its weights are on the meta device. `writes` are the calls that write
        to arguments. Attributes that the glue writes to are saved in `saved`."""
        self._graph, self._inputs, self._attribute, self._call_module = graph, inputs, attribute, call_module
        self._writes, self._saved = writes, saved
        self._calls_modules = False
        self._restart()

    def _restart(self) -> None:
        self._saved.restore()
        self._known: dict[fx.Node, Any] = dict(self._inputs())
        self._taken: dict[str, Any] = {}
        self._attributes: dict[int, torch.Tensor] = {}
        self._skipped: list[fx.Node] = []
        """Operations and modules that were not run, whose writes are missing."""
        self._last: fx.Node | None = None

    def value(self, node: fx.Node, *, call_modules: bool) -> Any:
        """The real value of `node`; `UNKNOWN` where it depends on a module's result, unless `call_modules`."""
        with unset_fake_temporarily(), DisablePythonDispatcher(), torch.no_grad():
            self._advance()
            if self._is_unknown(node) and call_modules and not self._calls_modules:
                self._calls_modules = True
                self._restart()
                self._advance()
            return UNKNOWN if self._is_unknown(node) else self._known[node]

    def _is_unknown(self, node: fx.Node) -> bool:
        if self._known[node] is UNKNOWN:
            return True
        memory = storages(node) if self._skipped else set()
        return any(storages(w) & memory for skipped in self._skipped for w in written_by(skipped, self._writes))

    def listed(self, node: fx.Node, *, call_modules: bool) -> Any:
        """`value` of a node as a number, or as lists of numbers; None where it is not at hand."""
        value = self.value(node, call_modules=call_modules)
        if value is UNKNOWN:
            return None
        with unset_fake_temporarily(), DisablePythonDispatcher():
            return value.tolist() if isinstance(value, torch.Tensor) else value

    def _advance(self) -> None:
        node = self._last.next if self._last is not None else next(iter(self._graph.nodes))
        while node.op != "root":
            if node not in self._known:
                self._known[node] = self._run(node)
                if self._known[node] is UNKNOWN and has_effect(node):
                    self._skipped.append(node)
            self._last = node
            node = node.next

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            path = str(node.target)
            if path not in self._taken:  # once: it may be a copy, and is written to
                self._taken[path] = self._attribute(path)
            value = self._taken[path]
            if not isinstance(value, torch.Tensor):
                return value
            self._attributes[value.untyped_storage()._cdata] = value
            return UNKNOWN if value.is_meta else value
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            hint = size.node.expr.xreplace(size.node.shape_env.backed_var_to_val)
            if hint.is_number:
                return int(hint)  # known also where it is the size of a module's result
        if any(self._is_unknown(i) for i in node.all_input_nodes) or node.meta.get("after"):
            return UNKNOWN  # also what a module returns that lacks what the glue has put on it
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._known[n])
        if node.op == "call_module":
            return self._call_module(str(node.target), args, kwargs) if self._calls_modules else UNKNOWN
        if node.op != "call_function" or node.target is setattr:
            return UNKNOWN
        assert callable(node.target)
        if has_effect(node):
            tensors = [x for x in flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            held = (self._attributes.get(x.untyped_storage()._cdata) for x in tensors)
            self._saved.save(x for x in held if x is not None)
        return node.target(*args, **kwargs)
