"""Runs a plan: the only loop over batches in the package. It knows no algorithm and no model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fxcalib.finiteness import check_finite
from fxcalib.intermediates import Intermediates
from fxcalib.modifiers.base import CurrentBatch, Modifier, ModuleResult, Scope
from fxcalib.planning import Plan, Step
from fxcalib.programs import Bound, Program
from fxcalib.progress import Progress
from fxcalib.report import SubgraphReport
from fxcalib.weights import Residency


@dataclass(frozen=True)
class BatchFacts:
    """What the executor keeps of a batch beside its values."""

    bound: Bound
    token_mask: torch.Tensor | None
    """(batch, sequence) bool, true where a token is real; None where nothing is padded."""
    samples: int
    tokens: int


class Batches:
    """The calibration batches, checked, bound to the program and stored."""

    def __init__(self, program: Program, store: Intermediates) -> None:
        self._program, self.store = program, store
        self.facts: list[BatchFacts] = []

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, batches: Iterable[Mapping[str, Any]], check: Callable[[Mapping[str, Any], int], None]) -> None:
        """Take in `batches`; `check(batch, index)` raises for a batch that the model cannot take."""
        for index, batch in enumerate(batches):
            check(batch, index)
            bound = self._program.bind(batch)
            self.store.append(bound.values)
            self.facts.append(_facts(batch, Bound(bound.variant, {}, bound.signature)))

    @property
    def variants(self) -> set[int]:
        """The variants of the program that the batches take."""
        return {fact.bound.variant for fact in self.facts}


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
        device: where subgraphs run. Weights return to the device they came from.
        progress: is told of every step and batch.
    """
    main = plans[min(plans)]
    residency = Residency(program.model, device)
    progress.plan(main.subgraphs, main.passes, len(batches))
    current = CurrentBatch()
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    results: list[ModuleResult] = []
    for index, step in enumerate(main.steps):
        started = time.perf_counter()
        scope = Scope(program.model, step.subgraph, program.modules(step.subgraph), current)
        if step.sweeps:
            with ExitStack() as stack:
                for position in step.modifiers:
                    stack.enter_context(modifiers[position].observe(scope))
                _sweep(index, step, plans, program, batches, current, device, progress)
        elif step.kind == "commit":
            for position in step.modifiers:
                for result in modifiers[position].commit(scope):
                    results.append(result)
                    progress.module(result)
        elif step.kind == "load":
            residency.load(program.called(step.subgraph))
        else:
            residency.unload(program.called(step.subgraph))
        seconds[step.subgraph, step.kind] += time.perf_counter() - started
    reports = tuple(
        SubgraphReport(
            k,
            program.targets(k),
            *(round(seconds[k, kind], 4) for kind in ("calibrate", "commit", "propagate")),
        )
        for k in range(main.subgraphs)
    )
    return Execution(reports, tuple(results))


def _sweep(
    index: int,
    step: Step,
    plans: Mapping[int, Plan],
    program: Program,
    batches: Batches,
    current: CurrentBatch,
    device: torch.device,
    progress: Progress,
) -> None:
    progress.sweep(step.subgraph, step.kind, len(batches))
    with torch.no_grad():
        for i, fact in enumerate(batches.facts):
            variant, signature = fact.bound.variant, fact.bound.signature
            own = plans[variant].steps[index]
            current.index = i
            current.token_mask = None if fact.token_mask is None else fact.token_mask.to(device)
            values = batches.store.load(i, own.reads, private=program.private(variant, step.subgraph))
            run = partial(program.run, variant, step.subgraph, values, signature)
            outputs = run()
            kept = {name: outputs[name] for name in own.writes}
            check_finite(kept, i, current.token_mask, run, program.model)
            batches.store.store(i, kept)
            batches.store.free(i, own.frees)
            progress.batch(fact.tokens)
    current.index, current.token_mask = -1, None


def _facts(batch: Mapping[str, Any], bound: Bound) -> BatchFacts:
    tensors = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim]
    samples = int(tensors[0].shape[0]) if tensors else 0
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        real = mask.bool()
        padded = not bool(real.all())
        return BatchFacts(bound, real if padded else None, samples, int(real.sum()))
    ids = batch.get("input_ids")
    return BatchFacts(bound, None, samples, ids.numel() if isinstance(ids, torch.Tensor) else samples)
