"""Cuts a traced graph at its sequential targets into subgraphs that run one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxcalib.errors import OptionError
from fxcalib.partitioning.stages import Stages
from fxcalib.partitioning.subgraph import Subgraph, Value
from fxcalib.tracing import BoundBatch, GuardError, TracedModel, TraceError, trace
from fxcalib.tracing.preserve import SavedTensors

__all__ = ["Partition", "Subgraph", "Value", "Variants", "partition"]


@dataclass(frozen=True, eq=False)
class Partition:
    """The subgraphs of one traced model, in running order."""

    traced: TracedModel
    subgraphs: tuple[Subgraph, ...]
    targets_per_subgraph: int = 1
    shared_state: tuple[str, ...] = ()
    """Buffers that one subgraph changes and another one reads or changes as well."""

    def __iter__(self) -> Iterator[Subgraph]:
        return iter(self.subgraphs)

    def __len__(self) -> int:
        return len(self.subgraphs)

    def __getitem__(self, index: int) -> Subgraph:
        return self.subgraphs[index]

    @cached_property
    def variants(self) -> Variants:
        """This partition and those of the batches that broke its guards."""
        return Variants(self)

    def run(self, batch: Mapping[str, Any]) -> Any:
        """Run the subgraphs one after another: what `model(**batch)` returns, bit for bit.

        A batch that breaks a guard is traced anew (and the trace kept for the next of its kind).

        Raises:
            TraceError: the batch breaks a guard and cannot be traced either.
        """
        random = torch.get_rng_state()
        partition, bound = self.variants.bind(batch)
        saved = SavedTensors()
        saved.save(partition.traced.written_tensors(bound))
        try:
            return partition._run(bound)
        except GuardError:
            torch.set_rng_state(random)
            saved.restore()
            again = self.variants.retrace(batch)
            return again._run(again.traced.bind(batch))

    def _run(self, bound: BoundBatch) -> Any:
        values = dict(bound.inputs)
        with torch.no_grad():
            for subgraph in self.subgraphs:
                outputs = subgraph.run(values, bound.signature)
                for name in subgraph.frees:
                    del values[name]
                values.update(outputs)
            result = values[next(node.name for node in self.traced.graph.nodes if node.op == "output")]
        return self.traced.rebuild(result)

    def __str__(self) -> str:
        return "\n".join(str(subgraph) for subgraph in self.subgraphs)


class Variants:
    """The partitions of one model for batches that take different ways through its forward.

    Batches are matched against the guards of each; one that fits none is traced.
    """

    def __init__(self, first: Partition) -> None:
        self.partitions = [first]

    @property
    def retraces(self) -> int:
        """How many batches had to be traced anew."""
        return len(self.partitions) - 1

    def bind(self, batch: Mapping[str, Any], kept: SavedTensors | None = None) -> tuple[Partition, BoundBatch]:
        """The first partition whose guards `batch` satisfies; traces where there is none. `kept`: see `bind` of it."""
        for partition in self.partitions:
            try:
                return partition, partition.traced.bind(batch, kept)
            except GuardError:
                continue
        partition = self.retrace(batch)
        return partition, partition.traced.bind(batch, kept)

    def retrace(self, batch: Mapping[str, Any]) -> Partition:
        """Trace and partition with `batch`, and keep the result for the next of its kind."""
        first = self.partitions[0]
        known = first.traced.targets
        traced = trace(first.traced.model, batch, known.patterns, ignore=known.ignore, device=first.traced.device)
        again = partition(traced, first.targets_per_subgraph)
        self.partitions.append(again)
        return again


def partition(traced: TracedModel, targets_per_subgraph: int = 1) -> Partition:
    """Cut `traced` into subgraphs of `targets_per_subgraph` target calls each, and one for what follows the last.

    Raises:
        OptionError: `targets_per_subgraph` is not positive.
        TraceError: the traced batch called no target.
    """
    if targets_per_subgraph < 1:
        raise OptionError(f"targets_per_subgraph must be at least 1, not {targets_per_subgraph}")
    names = set(traced.targets.names)
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target in names]
    if not calls:
        raise TraceError(f"the batch reached none of the sequential targets {', '.join(traced.targets.patterns)}")
    stages = Stages(traced, {node: i // targets_per_subgraph for i, node in enumerate(calls)})
    stored = stages.cut()
    return Partition(traced, tuple(stages.subgraphs(stored)), targets_per_subgraph, stages.shared_state())
