"""Whether a second forward is the same program as the first, although the first has changed attributes of the model.

The forward is recorded twice in a row, in one graph, and the values of both runs are numbered: the same number for the
same operation on the same numbers. What the second run takes from the first and what depends on the data of the first
batch has a number of its own there. So a table that is made once and kept makes no difference; a counter, a running
mean or a state that is carried on does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxcalib.tracing.errors import TraceError
from fxcalib.tracing.graph import GraphTracer, Template, instantiate, is_call, is_check
from fxcalib.tracing.guards import Known, Relation, ValueGuard
from fxcalib.tracing.state import MISSING, Entry, GlueState
from fxcalib.tracing.structure import PLAIN, is_symbolic
from fxcalib.tracing.torch_private import free_unbacked_symbols, get_proxy_slot, pytree
from fxcalib.tracing.writes import Calls, sources, storages, writers

KEPT_STATE = "state kept between calls"

_OF_SIZES = ("sym_size", "sym_stride", "sym_numel", "zeros_like", "ones_like", "empty_like", "full_like")
"""Operations that look at nothing but the metadata of their tensors; so do those called `new_...`."""


@dataclass(frozen=True)
class Run:
    """One of several runs in a graph."""

    output: fx.Node
    structure: str
    guards: int
    """How many value guards there were when it ended."""


class SecondRun:
    """Several runs of a forward, recorded one behind the other: is the last the same program as the one before it?"""

    def __init__(
        self, runs: Sequence[Run], guards: Sequence[ValueGuard], numbering: Numbering, state: GlueState
    ) -> None:
        """`state` has seen the last two runs. Those before have only made known what sizes the model takes."""
        self._numbering, self._state = numbering, state
        (before, first, second), last = runs[-3:], len(runs) - 1
        self._programs = [
            (numbering.effects[run], numbering.numbers[of.output], of.structure)
            for run, of in ((last - 1, first), (last, second))
        ]
        self._asked = [
            {self._text(guard, run) for guard in guards[start.guards : end.guards]}
            for run, start, end in ((last - 1, before, first), (last, first, second))
        ]

    def check(self, model: nn.Module) -> None:
        """Raise TraceError where the last run is another program."""
        if shared := self._state.shared():
            raise refusal(model, shared, self._state, "its forward changes what modules that it calls hold as well:")
        changes = self._state.changes()
        unsettled = [e for key, e in changes.items() if described(e.value) != described(self._state.after(1, key))]
        unsettled += [e for key, e in self._state.changes(1).items() if key not in changes]
        if unsettled:
            raise refusal(model, unsettled, self._state)
        if self._programs[0] == self._programs[1] and self._asked[1] <= self._asked[0]:
            return
        carried = [e for e in changes.values() if self._numbering.carries(e.value)]
        numbers = [e for e in changes.values() if isinstance(e.value, PLAIN)]
        raise refusal(model, carried or numbers or list(changes.values()), self._state)

    def _text(self, guard: ValueGuard, run: int) -> str:
        numbers = [self._numbering.seen(node, run) for node in guard.nodes]
        if isinstance(guard, Relation):
            places = {symbol: sympy.Symbol(f"value_{i}") for i, symbol in enumerate(guard.symbols)}
            return f"{numbers} {guard.fact.xreplace(places)}"
        assert isinstance(guard, Known)
        return f"{numbers} {guard.expected!r}"


class Numbering:
    """Numbers for the values of a graph that holds several runs.

    Two values have the same number if the same operations lead to them from the batch of their run and from the model.
    """

    def __init__(self, tracer: GraphTracer, writes: Calls, outputs: Sequence[fx.Node]) -> None:
        """Each of `outputs` ends a run; the placeholders of all runs are at the beginning of the graph."""
        self._tracer = tracer
        nodes = list(tracer.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        each = len(inputs) // len(outputs)
        self._places = {node: i % each for i, node in enumerate(inputs)}
        self._runs = {node: i // each for i, node in enumerate(inputs)}
        for node in nodes[len(inputs) :]:
            self._runs[node] = sum(output < node for output in outputs)
        self._writers = writers(nodes, writes)
        lasting = (n for n in nodes if n.op == "placeholder" or (n.op == "get_attr" and self._is_of_model(n)))
        self._lasting = {s for n in lasting for s in storages(n)}
        self._of_batch: set[fx.Node] = set()
        """Values that depend on the data of the batch of their run."""
        self._carried: set[fx.Node] = set()
        """Values that a later run takes."""
        self._known: dict[str, int] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.effects: list[list[int]] = [[] for _ in outputs]
        """For each run the calls, and the writes to what is not its own, in order."""
        drawn = [0 for _ in outputs]
        for node in nodes:
            run = self._runs[node]
            key = self._key(node)
            if _is_random(node):
                drawn[run] += 1
                key += f" drawn {drawn[run]}"
            if self._depends_on_batch(node):
                self._of_batch.add(node)
            self.numbers[node] = self._known.setdefault(key, len(self._known))
            if is_call(node) or node.target is setattr or self._writers.get(node, set()) & self._lasting:
                self.effects[run].append(self.numbers[node])

    def seen(self, node: fx.Node, run: int) -> int:
        """The number of a value for a run that takes it."""
        if self._runs[node] == run:
            return self.numbers[node]
        self._carried.add(node)
        return -1 - self.numbers[node] if node in self._of_batch else self.numbers[node]

    def carries(self, value: Any) -> bool:
        """Whether `value` is a tensor that one run has made and a later one takes."""
        slot: Any = get_proxy_slot(value, self._tracer, None) if isinstance(value, torch.Tensor) else None
        return slot is not None and slot.proxy.node in self._carried

    def _key(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"input {self._places[node]}"
        if node.op == "get_attr":
            if self._is_of_model(node):
                return f"attribute {node.target}"
            return f"constant {described(self._tracer.constants[str(node.target)])}"
        if is_check(node):
            return "check"
        run = self._runs[node]
        arguments = fx.node.map_aggregate((node.args, node.kwargs), lambda value: self._argument(value, run))
        target = str(node.target) if isinstance(node.target, (str, torch._ops.OpOverload)) else described(node.target)
        return f"{node.op} {target} {arguments!r} after {self._written_before(node)}"

    def _argument(self, value: Any, run: int) -> str:
        if not isinstance(value, fx.Node):
            return described(value)
        size = value.meta.get("val")
        if isinstance(size, torch.SymInt) and not free_unbacked_symbols(size):
            return described(size)  # the first run may have found that it is a certain number
        return f"%{self.seen(value, run)}"

    def _written_before(self, node: fx.Node) -> list[int]:
        """Earlier writes to the memory of the inputs, but for those of earlier runs to the model and to batches."""
        run, memory = self._runs[node], {s for source in node.all_input_nodes for s in storages(source)}
        earlier = ((w, written & memory) for w, written in self._writers.items() if w < node)
        return [self.seen(w, run) for w, m in earlier if m and (self._runs[w] == run or not m <= self._lasting)]

    def _depends_on_batch(self, node: fx.Node) -> bool:
        if node.op == "placeholder" or is_call(node) or node.target is instantiate or _is_random(node):
            return True
        if node.op == "get_attr":  # what is written to in place is another value by the time of the next run
            return any(storages(node) & written for written in self._writers.values())
        name = getattr(getattr(node.target, "_overloadpacket", None), "__name__", "")
        if name in _OF_SIZES or name.startswith("new_"):
            return False
        return any(source in self._of_batch for source in sources(node, self._writers))

    def _is_of_model(self, node: fx.Node) -> bool:
        value = self._tracer.constants.get(str(node.target), MISSING)
        return value is MISSING or id(value) in self._tracer.existing


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


_GOES_BY = "what its forward does depends on what an earlier call has left in"


def refusal(model: nn.Module, entries: Iterable[Entry], state: GlueState, reason: str = _GOES_BY) -> TraceError:
    """The error that names what the forward changes, and why that matters."""
    named: Mapping[tuple[str, str], Entry] = {(entry.module, entry.attribute): entry for entry in entries}
    parts, calls = [], []
    for module, attribute in sorted(named):
        line = state.line(named[module, attribute])
        kind = type(model.get_submodule(module)).__name__
        where = f"of {module} ({kind})" if module else f"of the model ({kind})"
        parts.append(f"{attribute!r} {where}" + (f",\n  changed at {line}" if line is not None else ""))
        calls += [] if line is None else [line]
    return TraceError(
        f"{type(model).__name__} cannot be traced: {reason} "
        + ",\n  and in ".join(parts)
        + "\n  The subgraphs do not assign it, so every batch would be computed as the first one. Wrap the method that "
        "reads and changes it with fxcalib.wrap,\n  change a buffer in place, or calibrate batch after batch: "
        "pipeline='basic' (fxcalib quantize --pipeline basic)",
        kind=KEPT_STATE,
        calls=tuple(calls),
    )


def described(value: Any, depth: int = 6) -> str:
    """A value as text, the same for alike values: tensors by dtype and shape, real ones of few elements by data."""
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if is_symbolic(value):
        return f"{type(value).__name__.removeprefix('Sym').lower()} {value.node.expr}"
    if isinstance(value, torch.Tensor):
        data = value.tolist() if type(value) is torch.Tensor and not value.is_meta and value.numel() < 64 else ""
        return f"{value.dtype} {tuple(value.shape)} {data}"
    if isinstance(value, pytree.TreeSpec):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", "") or str(id(value))
    if not depth:
        return type(value).__name__
    if isinstance(value, Template):
        return described(value.value, depth)
    if isinstance(value, dict):
        return f"{type(value).__name__} {described(list(value.items()), depth)}"
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return f"{type(value).__name__} {[described(item, depth - 1) for item in value]}"
    return f"{type(value).__name__} {described(getattr(value, '__dict__', {}), depth - 1)}"
