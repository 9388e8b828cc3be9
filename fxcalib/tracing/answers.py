"""What is known of a batch's data while a forward is recorded: questions are answered on real values, and guarded."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from fxcalib.tracing.errors import TraceError, source_of_frame
from fxcalib.tracing.failure import DATA_DEPENDENT_BRANCH, DATA_DEPENDENT_SIZE
from fxcalib.tracing.graph import GraphTracer
from fxcalib.tracing.guards import Known, Relation, ValueGuard
from fxcalib.tracing.modes import Modes
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.torch_private import FakeTensor, get_proxy_slot
from fxcalib.tracing.values import RealPrefix
from fxcalib.tracing.writes import Calls, last_writer, sources, writers


class Answers:
    """Answers what the model asks of data, with the graph recorded so far run on the real batch.

    What the trace then goes on with is a value guard. `writes` are the calls that write to arguments.
    """

    def __init__(self, tracer: GraphTracer, env: Sizes, modes: Modes, writes: Calls, *, symbolic_data: bool) -> None:
        self._tracer, self._env, self._modes, self._writes = tracer, env, modes, writes
        self._symbolic_data = symbolic_data
        self.prefix: RealPrefix | None = None
        """The graph on the real batch; None where there is none."""
        self.guards: list[ValueGuard] = []
        self.told = 0
        """How often opaque modules were told what data is."""
        self.guesses = 0
        """How many numbers that depend on data were guessed in opaque modules."""

    def value_of(self, symbol: sympy.Symbol) -> int | float | None:
        """What a symbol that depends on data is on the traced batch. In opaque modules, where only sizes count, 1."""
        node = self._node_of(symbol)
        value = None if node is None else self.listed(node, call_modules=True)
        if value is None and self._modes.inside:
            self.guesses += symbol not in self._env.size_like  # how many there are of something is of no interest
            return 1
        return value

    def assumed(self, fact: sympy.Basic) -> None:
        """Keep what the trace goes on with as a guard. In opaque modules it is no assumption: replay runs them."""
        if not self._modes.in_glue:
            return
        fact = self._env.replace(fact)
        symbols = tuple(sorted(fact.free_symbols, key=str))
        nodes = [self._node_of(symbol) for symbol in symbols]
        known = tuple(node for node in nodes if node is not None)
        if len(known) < len(nodes):
            raise TraceError(
                f"the model assumes {fact}, which cannot be held against other batches", kind=DATA_DEPENDENT_SIZE
            )
        self.guard(Relation(known, source_of_frame(sys._getframe(1)), fact, symbols))

    def known(self, tensor: torch.Tensor, *, call_modules: bool = False) -> torch.Tensor | None:
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None or self.prefix is None:
            return None
        value = self.prefix.value(slot.proxy.node, call_modules=call_modules)
        return value if isinstance(value, torch.Tensor) else None

    def ask(self, tensor: torch.Tensor, symbolic: bool) -> Any:
        """What a tensor holds, on the traced batch; None where torch may answer, with symbols."""
        if not self._modes.recording or not isinstance(tensor, FakeTensor):
            return None
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None or (self.prefix is None and symbolic):
            return None
        if not self._modes.in_glue:
            answer = self.listed(slot.proxy.node, call_modules=False) if self._modes.on_fakes else None
            if answer is not None:
                self.tell(slot.proxy.node, answer)
            return answer
        if symbolic and self._symbolic_data:
            return None
        source = source_of_frame(sys._getframe(2))
        answer = self.listed(slot.proxy.node, call_modules=True)
        if answer is None:
            raise TraceError(
                f"the model branches on data that is not known while tracing: {tuple(tensor.shape)} {tensor.dtype}, "
                f"at {source}\n  The batch, or a module that it depends on, is on the meta device: "
                "trace the model with weights and a real batch.",
                kind=DATA_DEPENDENT_BRANCH,
            )
        self.guard(Known((slot.proxy.node,), source, answer))
        return answer

    def listed(self, node: fx.Node, *, call_modules: bool) -> Any:
        if self.prefix is None:
            return None
        with self._modes.unrecorded():
            return self.prefix.listed(node, call_modules=call_modules)

    def tell(self, node: fx.Node, answer: Any) -> None:
        """An opaque module was told what `node` is: its result may hang on it, so that batches have to be alike."""
        self.told += 1
        known = [guard for guard in self.guards if isinstance(guard, Known) and guard.nodes == (node,)]
        if not any(guard.after is last_writer((node,), self._writers()) for guard in known):
            self.guard(Known((node,), source_of_frame(sys._getframe(1)), answer))

    def guard(self, guard: ValueGuard) -> None:
        guard = replace(guard, after=last_writer(guard.nodes, self._writers()))
        self.guards.append(guard)
        nodes = guard.nodes if guard.after is None else (*guard.nodes, guard.after)
        if any(self.depends_on_modules(node) for node in nodes):
            self._tracer.create_node("call_function", guard.check, guard.nodes, {})

    def _writers(self) -> dict[fx.Node, set[Any]]:
        return writers(self._tracer.graph.nodes, self._writes)

    def depends_on_modules(self, node: fx.Node) -> bool:
        seen, pending, writing = {node}, [node], self._writers()
        while pending:
            current = pending.pop()
            size = current.meta.get("val")
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols <= self._env.backed_var_to_val.keys():
                continue  # a size that follows from those of the batch
            if current.op == "call_module":
                return True
            read = sources(current, writing)
            pending += [source for source in read if source not in seen]
            seen.update(read)
        return False

    def _node_of(self, symbol: sympy.Symbol) -> fx.Node | None:
        tracked = self._tracer.sympy_expr_tracker.get(symbol)
        if tracked is None:
            return None
        with self._modes.unrecorded():
            proxy: Any = tracked.proxy.force() if hasattr(tracked.proxy, "force") else tracked.proxy
        return proxy.node  # type: ignore[no-any-return]
