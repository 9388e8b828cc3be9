"""Runs a plan: the only loop over batches in the package. It knows no algorithm and no model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fxcalib.finiteness import FiniteChecks
from fxcalib.intermediates import Intermediates
from fxcalib.modifiers.base import CurrentBatch, Modifier, ModuleResult, Scope
from fxcalib.planning import Originals, Plan, Step
from fxcalib.profiling import span
from fxcalib.programs import Bound, Program
from fxcalib.progress import Progress
from fxcalib.report import SubgraphReport
from fxcalib.weights import Residency


@dataclass(frozen=True)
class BatchFacts:
    """What the executor keeps of a batch beside its values."""

    variant: int
    signature: tuple[Any, ...]
    token_mask: torch.Tensor | None
    """(batch, sequence) bool, true where a token is real and, with a `loss_mask`, in it; None where all tokens are."""
    samples: int
    tokens: int


class Batches:
    """The calibration batches, checked, bound to the program and stored."""

    def __init__(self, program: Program, store: Intermediates, originals: Intermediates | None = None) -> None:
        self._program, self.store = program, store
        self.originals = originals
        """The values that the original model has of each batch; None where nobody asks for them."""
        self.facts: list[BatchFacts] = []
        self._first: Bound | None = None
        self.shared: dict[int, frozenset[str]] = {}
        """Variant -> values that a subgraph writes to in place."""

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, given: Iterable[object], prepare: Callable[[object, int], Mapping[str, Any]]) -> None:
        """Take in batches; `prepare(batch, index)` raises for one that the model cannot take, or says what it takes."""
        with self._program.binding():
            for index, each in enumerate(given):
                batch = prepare(each, index)
                bound = self._program.bind(batch)
                self._first = self._first or bound
                if bound.variant not in self.shared:
                    parts = self._program.parts(bound.variant)
                    self.shared[bound.variant] = frozenset(name for part in parts for name in part.changes)
                self.store.append(bound.values, shared=self.shared[bound.variant])
                if self.originals is not None:
                    own = self._program.once_more(bound, batch)
                    self.originals.append(own, shared=self.shared[bound.variant])
                self.facts.append(_facts(each, bound))

    def bytes_of(self, names: Collection[str]) -> int:
        """Bytes of the values `names` of all batches, if all are like the first; 0 where that is not known."""
        return 0 if self._first is None else self._program.bytes_of(self._first, names) * len(self)

    @property
    def variants(self) -> set[int]:
        """The variants of the program that the batches take."""
        return set(self.shared)


@dataclass(frozen=True)
class Execution:
    """What running a plan gave."""

    subgraphs: tuple[SubgraphReport, ...]
    modules: tuple[ModuleResult, ...]


def execute(
    plans: Mapping[int, Plan],
    program: Program,
    batches: Batches,
    modifiers: Sequence[Modifier],
    *,
    device: torch.device,
    progress: Progress,
) -> Execution:
    """Run a plan over all batches.

    Args:
        plans: variant of the program -> plan; the same steps for each, with the names of that variant.
        program: the subgraphs.
        batches: the calibration batches, bound to `program`.
        modifiers: attached modifiers; steps name them by position.
        device: where subgraphs run. Weights return to the device they came from, after a failure too.
        progress: is told of every step and batch.
    """
    return _Run(plans, program, batches, modifiers, device, progress).execute()


class _Run:
    def __init__(
        self,
        plans: Mapping[int, Plan],
        program: Program,
        batches: Batches,
        modifiers: Sequence[Modifier],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._plans, self._program, self._batches, self._modifiers = plans, program, batches, modifiers
        self._device, self._progress = device, progress
        self._main = plans[0]
        self._current = CurrentBatch()
        self._results: list[ModuleResult] = []

    def execute(self) -> Execution:
        self._progress.plan(self._main.subgraphs, self._main.passes, len(self._batches))
        seconds: dict[tuple[int, str], float] = defaultdict(float)
        residency = Residency(self._program.model, self._device)
        last = {step.subgraph: index for index, step in enumerate(self._main.steps)}
        try:
            for index, step in enumerate(self._main.steps):
                started = time.perf_counter()
                self._step(index, step, residency)
                seconds[step.subgraph, step.kind] += time.perf_counter() - started
                if last[step.subgraph] == index:
                    spent = sum(each for (subgraph, _), each in seconds.items() if subgraph == step.subgraph)
                    self._progress.subgraph(step.subgraph, spent)
        finally:
            residency.unload_all()
        reports = (
            SubgraphReport(
                k,
                self._program.targets(k),
                calibrate_seconds=round(seconds[k, "calibrate"], 4),
                commit_seconds=round(seconds[k, "commit"], 4),
                propagate_seconds=round(seconds[k, "propagate"], 4),
            )
            for k in range(self._main.subgraphs)
        )
        return Execution(tuple(reports), tuple(self._results))

    def _step(self, index: int, step: Step, residency: Residency) -> None:
        if step.kind == "load":
            residency.load(step.subgraph, self._program.called(step.subgraph))
            return
        if step.kind == "unload":
            residency.unload(step.subgraph)
            return
        with span("copies"):
            residency.wait(step.subgraph)
        if step.sweeps:
            with ExitStack() as observing:
                for position in step.modifiers:
                    observing.enter_context(self._modifiers[position].observe(self._scope(step)))
                self._sweep(index, step)
        else:
            with span("solve"):
                results = [
                    r for position in step.modifiers for r in self._modifiers[position].commit(self._scope(step))
                ]
            self._results.extend(results)
            for result in results:
                self._progress.module(result)

    def _scope(self, step: Step) -> Scope:
        return Scope(self._program.model, step.subgraph, self._program.modules(step.subgraph), self._current)

    def _sweep(self, index: int, step: Step) -> None:
        store, current, facts = self._batches.store, self._current, self._batches.facts
        self._progress.sweep(step.subgraph, step.kind, len(facts))
        again = any(s.sweeps and s.subgraph == step.subgraph for s in self._main.steps[index + 1 :])
        checks = FiniteChecks(self._program.model)
        with torch.no_grad(), self._program.sweeping(step.subgraph, again=again):
            for i, fact in enumerate(facts):
                own = self._plans[fact.variant].steps[index]
                part = self._program.parts(fact.variant)[step.subgraph]
                current.index = i
                current.token_mask = None if fact.token_mask is None else fact.token_mask.to(self._device)
                if own.originals is not None:
                    self._pass_original(i, own, own.originals)
                with span("copies"):
                    values = store.load(i, own.reads, private=part.changes if again else ())
                    if i + 1 < len(facts):
                        store.prefetch(i + 1, self._plans[facts[i + 1].variant].steps[index].reads)
                run = partial(self._program.run, fact.variant, step.subgraph, values, fact.signature, own.writes)
                with span("forward"):
                    outputs = run()
                kept = {name: outputs[name] for name in own.writes}
                checks.add(kept, i, current.token_mask, run)
                with span("copies"):
                    store.store(i, kept, shared=self._batches.shared[fact.variant])
                    store.free(i, own.frees)
                store.pace()
                self._progress.batch(fact.tokens)
            checks.finish()
        current.index, current.token_mask = -1, None

    def _pass_original(self, i: int, step: Step, originals: Originals) -> None:
        """Run a batch with the values that the original model has of it."""
        store, fact = self._batches.originals, self._batches.facts[i]
        assert store is not None
        with span("copies"):
            values = store.load(i, step.reads)
        self._current.original = True
        with span("forward"), self._program.on_trial(step.subgraph):
            outputs = self._program.run(fact.variant, step.subgraph, values, fact.signature, originals.writes)
        self._current.original = False
        with span("copies"):
            store.store(i, {n: outputs[n] for n in originals.writes}, shared=self._batches.shared[fact.variant])
            store.free(i, originals.frees)
        store.pace()


def _facts(batch: object, bound: Bound) -> BatchFacts:
    """Of a batch as the caller made it: its `loss_mask` never reaches the model."""
    assert isinstance(batch, Mapping)
    tensors = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim]
    samples = int(tensors[0].shape[0]) if tensors else 0
    real, chosen = _token_mask(batch, "attention_mask"), _token_mask(batch, "loss_mask")
    ids = batch.get("input_ids")
    tokens = ids.numel() if isinstance(ids, torch.Tensor) else samples
    if real is not None:
        tokens = int(real.sum())
        chosen = real if chosen is None else real & chosen.to(real.device)
    everything = chosen is None or bool(chosen.all())
    return BatchFacts(bound.variant, bound.signature, None if everything else chosen, samples, tokens)


def _token_mask(batch: Mapping[str, Any], key: str) -> torch.Tensor | None:
    """(batch, sequence) bool; None where the batch has no such mask."""
    mask = batch.get(key)
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
