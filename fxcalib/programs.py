"""What the executor runs: the subgraphs of a traced model, or a whole model as its only subgraph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxcalib.partitioning import Partition, Variants
from fxcalib.planning import Part
from fxcalib.tracing import TraceError


@dataclass(frozen=True)
class Bound:
    """A batch that the program can run."""

    variant: int
    """Which way the batch takes through the model; batches of one variant share names and guards."""
    values: Mapping[str, Any]
    signature: tuple[Any, ...]


class Program(ABC):
    """A sequence of subgraphs over one live model."""

    model: nn.Module

    @abstractmethod
    def bind(self, batch: Mapping[str, Any]) -> Bound:
        """Accept a batch: find (or make) the variant whose guards it satisfies."""

    @abstractmethod
    def parts(self, variant: int) -> Sequence[Part]:
        """The subgraphs of one variant as planning sees them. All variants have the same modules in the same order."""

    @abstractmethod
    def inputs(self, variant: int) -> tuple[str, ...]:
        """Names of the values that batches of this variant bring."""

    @abstractmethod
    def targets(self, subgraph: int) -> tuple[str, ...]:
        """Qualified names of the sequential targets that a subgraph calls."""

    @abstractmethod
    def run(
        self,
        variant: int,
        subgraph: int,
        values: Mapping[str, Any],
        signature: tuple[Any, ...],
        wanted: Collection[str],
    ) -> Mapping[str, Any]:
        """Run a subgraph on its inputs; returns its outputs, at least those `wanted`."""

    @abstractmethod
    def called(self, subgraph: int) -> Sequence[nn.Module]:
        """The modules that a subgraph calls itself: with all below them, the weights that it needs."""

    @property
    def retraces(self) -> int:
        """How many batches broke a guard and were traced anew."""
        return 0

    def modules(self, subgraph: int) -> dict[str, nn.Module]:
        """Every module that a subgraph runs and no earlier one does, by qualified name."""
        named = dict(self.model.named_modules())
        wanted = self.parts(0)[subgraph].modules
        return {name: module for name, module in named.items() if name in wanted}


class TracedProgram(Program):
    """The subgraphs of a partition and of its variants."""

    def __init__(self, partition: Partition) -> None:
        self.model = partition.traced.model
        self._variants: Variants = partition.variants
        self._parts: dict[int, list[Part]] = {}

    @property
    def partition(self) -> Partition:
        """The partition of the first batch."""
        return self._variants.partitions[0]

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        partition = self._variants.select(batch)
        first, own = ([subgraph.targets for subgraph in p] for p in (self.partition, partition))
        if first != own:
            raise TraceError(
                "a batch takes another way through the sequential targets than the first one, so that subgraphs cannot "
                f"be calibrated on both: {own} instead of {first}. Calibrate on batches of one kind, or use the basic "
                "pipeline"
            )
        bound = partition.traced.bind(batch)
        return Bound(self._variants.partitions.index(partition), bound.inputs, bound.signature)

    def parts(self, variant: int) -> Sequence[Part]:
        if variant not in self._parts:
            self._parts[variant] = self._make_parts(self._variants.partitions[variant])
        return self._parts[variant]

    def _make_parts(self, partition: Partition) -> list[Part]:
        names = {id(module): name for name, module in reversed(list(self.model.named_modules()))}
        claimed: set[str] = set()
        parts = []
        for subgraph in partition:
            inside = {names[id(m)] for called in subgraph.modules for m in called.modules()} - claimed
            claimed |= inside
            parts.append(Part(subgraph.index, frozenset(inside), subgraph.inputs, subgraph.outputs, subgraph.writes))
        # a module that no subgraph calls (its weight is read by glue, or nothing reads it) is compressed with the last
        rest = set(names.values()) - claimed - partition.traced.targets.ancestors
        parts[-1] = replace(parts[-1], modules=parts[-1].modules | rest)
        return parts

    def inputs(self, variant: int) -> tuple[str, ...]:
        graph = self._variants.partitions[variant].traced.graph
        return tuple(node.name for node in graph.nodes if node.op == "placeholder")

    def targets(self, subgraph: int) -> tuple[str, ...]:
        return self.partition[subgraph].targets

    def called(self, subgraph: int) -> Sequence[nn.Module]:
        return self.partition[subgraph].modules

    def run(
        self,
        variant: int,
        subgraph: int,
        values: Mapping[str, Any],
        signature: tuple[Any, ...],
        wanted: Collection[str],
    ) -> Mapping[str, Any]:
        return self._variants.partitions[variant][subgraph].run(values, signature)

    @property
    def retraces(self) -> int:
        return self._variants.retraces


class WholeProgram(Program):
    """A model as one subgraph that is never looked into: nothing is traced, nothing propagated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._keys: list[tuple[str, ...]] = []

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        keys = tuple(batch)
        if keys not in self._keys:
            self._keys.append(keys)
        return Bound(self._keys.index(keys), dict(batch), ())

    def parts(self, variant: int) -> Sequence[Part]:
        return [Part(0, frozenset(name for name, _ in self.model.named_modules()), self.inputs(variant), ())]

    def inputs(self, variant: int) -> tuple[str, ...]:
        return self._keys[variant] if self._keys else ()

    def targets(self, subgraph: int) -> tuple[str, ...]:
        return ()

    def called(self, subgraph: int) -> Sequence[nn.Module]:
        return (self.model,)

    def run(
        self,
        variant: int,
        subgraph: int,
        values: Mapping[str, Any],
        signature: tuple[Any, ...],
        wanted: Collection[str],
    ) -> Mapping[str, Any]:
        with torch.no_grad():
            self.model(**values)
        return {}
