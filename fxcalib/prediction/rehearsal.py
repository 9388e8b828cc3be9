"""Runs each kind of subgraph once on fake tensors of the real sizes: what it would hold, compute and read.

The program that a calibration executes is run itself, with the modifiers' own observers, so hidden activations,
statistics and their temporaries are those of the code that will run. Subgraphs that differ in nothing but their
weights' values are run once.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcalib.modifiers.base import CurrentBatch, Modifier, Scope
from fxcalib.planning import Plan, Step
from fxcalib.prediction.tracking import Allocations
from fxcalib.programs import Bound, Program, TracedProgram
from fxcalib.tracing.preserve import fake_weights, preserved_state
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.torch_private import FakeTensorMode


@dataclass(frozen=True)
class Rehearsed:
    """What one pass of one batch through a subgraph takes."""

    working_bytes: int = 0
    """Most bytes of activations and temporaries at once, results included, beyond inputs, weights and statistics."""
    statistics_bytes: int = 0
    """What observers hold from batch to batch."""
    flops: int = 0
    """Floating-point operations of matrix products and attention, those of the observers included."""
    float32_flops: int = 0
    """Those of `flops` in float32; the others are in the model's dtype."""
    traffic: int = 0
    """Bytes that all other operations read and write."""
    shared: tuple[tuple[str, ...], ...] = ()
    """Observed modules by the tensor that they read: one set of statistics for each."""


class _Over(Exception):
    """Leaves an observer before it looks at the values of its statistics, which fakes do not have."""


class Rehearsal:
    """The steps of a plan on fakes, of sizes `bound` brings, on `device`."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        modifiers: Sequence[Modifier],
        bound: Bound,
        token_mask: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self._program, self._plan, self._modifiers = program, plan, modifiers
        self._bound, self._mask, self._device = bound, token_mask, device
        self._tokens = max((v.numel() for v in bound.values.values() if isinstance(v, torch.Tensor)), default=1)
        self._modules: dict[int, dict[str, nn.Module]] = {}
        self._kinds: dict[Hashable, dict[str, Rehearsed]] = {}

    def run(self) -> dict[tuple[int, str], Rehearsed]:
        """(Subgraph, kind of step) -> what one batch takes."""
        found: dict[tuple[int, str], Rehearsed] = {}
        sweeps: dict[int, list[Step]] = {}
        for step in self._plan.steps:
            if step.sweeps:
                sweeps.setdefault(step.subgraph, []).append(step)
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=Sizes())
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(preserved_state(self._program.model))
            stack.enter_context(fake_weights(self._program.model, mode, self._device))
            stack.enter_context(mode)
            for index, steps in sweeps.items():
                kind = self.kind(index, steps)
                if kind not in self._kinds:
                    self._kinds[kind] = self._rehearse(index, steps)
                for step in steps:
                    found[index, step.kind] = self._kinds[kind][step.kind]
        return found

    def alike(self) -> list[int]:
        """For each subgraph the first that takes the same."""
        first: dict[Hashable, int] = {}
        steps = [[s for s in self._plan.steps if s.sweeps and s.subgraph == k] for k in range(self._plan.subgraphs)]
        return [first.setdefault(self.kind(k, steps[k]), k) for k in range(self._plan.subgraphs)]

    def modules(self, subgraph: int) -> dict[str, nn.Module]:
        """Every module that a subgraph runs, by qualified name."""
        if subgraph not in self._modules:
            self._modules[subgraph] = self._program.modules(subgraph)
        return self._modules[subgraph]

    def kind(self, subgraph: int, steps: Sequence[Step]) -> Hashable:
        """Equal for subgraphs that take the same: modules alike in class and sizes, values alike in shape and dtype."""
        modules = tuple(self._describe(m) for m in self.modules(subgraph).values())
        passes = tuple(
            (s.kind, s.modifiers, s.modules, len(s.reads), len(s.writes), s.originals and len(s.originals.writes))
            for s in steps
        )
        if not isinstance(self._program, TracedProgram):
            return (subgraph, passes)
        part = self._program.partition[subgraph]
        glue = tuple(str(n.target) for n in part.nodes if n.op == "call_function")
        values = tuple((v.shape, v.dtype) for v in part.values.values())
        return (modules, passes, glue, values)

    def _describe(self, module: nn.Module) -> Hashable:
        plain = (int, float, bool, str)
        settings = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"}
        own = [(name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False)]
        scheme = str(getattr(module, "quantization_scheme", ""))
        return (type(module), tuple(sorted(settings.items())), tuple(own), scheme)

    def _rehearse(self, subgraph: int, steps: Sequence[Step]) -> dict[str, Rehearsed]:
        found: dict[str, Rehearsed] = {}
        for step in steps:
            before = self._plan.steps[: self._plan.steps.index(step)]
            compressed = any(s.kind == "commit" and s.subgraph == subgraph for s in before)
            with _committed(self.modules(subgraph), compressed and step.kind == "propagate"):
                found[step.kind] = self._pass(step)
        return found

    def _pass(self, step: Step) -> Rehearsed:
        values = {name: self._fake(name, step.subgraph) for name in step.reads}
        scope = Scope(self._program.model, step.subgraph, self.modules(step.subgraph), CurrentBatch())
        scope.batch.token_mask = None if self._mask is None else _empty(self._mask, self._device)
        inputs = _Inputs()
        tracker = Allocations(self._tokens)
        for tensor in pytree.tree_leaves((values, scope.batch.token_mask)):
            if isinstance(tensor, torch.Tensor):
                tracker.ignore(tensor)
        for weight in (*self._program.model.parameters(), *self._program.model.buffers()):
            tracker.ignore(weight)
        with suppress(_Over), ExitStack() as stack:
            observed = {n for i in step.modifiers for n in self._modifiers[i].needs.observed}
            stack.enter_context(inputs.of({n: m for n, m in scope.modules.items() if n in observed}))
            for position in step.modifiers:
                stack.enter_context(self._modifiers[position].observe(scope))
            stack.enter_context(tracker)
            self._batch(step, values, scope, 0)  # statistics begin with the first batch: the second is like the rest
            held = tracker.live
            tracker.restart()
            self._batch(step, values, scope, 1)
            working = tracker.peak - held
            raise _Over
        return Rehearsed(working, held, tracker.flops, tracker.float32_flops, tracker.traffic, inputs.groups())

    def _batch(self, step: Step, values: Mapping[str, Any], scope: Scope, index: int) -> None:
        scope.batch.index = index
        if step.originals is not None:
            scope.batch.original = True
            self._program.run(self._bound.variant, step.subgraph, values, self._bound.signature, step.originals.writes)
            scope.batch.original = False
        self._program.run(self._bound.variant, step.subgraph, values, self._bound.signature, step.writes)

    def _fake(self, name: str, subgraph: int) -> Any:
        if name in self._bound.values:
            given = self._bound.values[name]
            return _empty(given, self._device) if isinstance(given, torch.Tensor) else given
        assert isinstance(self._program, TracedProgram)
        traced = self._program.partition.traced
        held = self._nodes[name].meta.get("val")
        sizes = self.sizes

        def number(size: Any) -> int:
            expression = traced.readable(size)
            return int(expression.xreplace({s: sizes.get(s.name, self._tokens) for s in expression.free_symbols}))

        def made(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return torch.empty(tuple(map(number, leaf.shape)), dtype=leaf.dtype, device=self._device)
            return number(leaf) if isinstance(leaf, torch.SymInt) else leaf

        return pytree.tree_map(made, held)

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        assert isinstance(self._program, TracedProgram)
        return {node.name: node for node in self._program.partition.traced.graph.nodes}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of each named dimension of the batch: `batch`, `sequence`, ..."""
        if not isinstance(self._program, TracedProgram):
            return {}
        return self._program.sizes(self._bound)


class _Inputs:
    """Which modules read the very same tensor."""

    def __init__(self) -> None:
        self._readers: list[tuple[weakref.ref[torch.Tensor], list[str]]] = []
        self._seen: set[str] = set()

    @contextmanager
    def of(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._hook(n), with_kwargs=True) for n, m in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs.get("input")
            if name in self._seen or not isinstance(inputs, torch.Tensor):
                return
            self._seen.add(name)
            for reference, readers in self._readers:
                if reference() is inputs:
                    readers.append(name)
                    return
            self._readers.append((weakref.ref(inputs), [name]))

        return see

    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(readers) for _, readers in self._readers)


@contextmanager
def _committed(modules: Mapping[str, nn.Module], yes: bool) -> Iterator[None]:
    """The modules as a commit leaves them: activations are quantized, weights are on their grid already."""
    changed = [m for m in modules.values() if yes and hasattr(m, "quantization_scheme")]
    before = [dict(module.__dict__) for module in changed]
    for module in changed:
        module.__dict__.update(quantization_status=QuantizationStatus.DECOMPRESSED, quantization_enabled=True)
    try:
        yield
    finally:
        for module, attributes in zip(changed, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _empty(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)
