"""What the executor runs: the subgraphs of a traced model, or a whole model as its only subgraph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxcalib.errors import ModelError
from fxcalib.partitioning import Partition, Variants
from fxcalib.planning import Part
from fxcalib.tracing import TraceError
from fxcalib.tracing.preserve import SavedTensors, preserved_attributes, saved_tensors
from fxcalib.tracing.structure import flatten_batch, path_name, paths_of, unflatten


@dataclass(frozen=True)
class Bound:
    """A batch that the program can run."""

    variant: int
    """Which way the batch takes through the model; batches of one variant share names and guards."""
    values: Mapping[str, Any]
    signature: tuple[Any, ...]


def out_of_step(what: str) -> ModelError:
    """The error of a model that ties batches together by something that it changes."""
    return ModelError(
        f"the model changes {what}, and other layers use that as well: layer after layer, they "
        "would find what the last batch has left in it instead of their own. Use pipeline='basic', which runs batch "
        "after batch"
    )


class Program(ABC):
    """A sequence of subgraphs over one live model."""

    model: nn.Module

    @contextmanager
    def binding(self) -> Iterator[None]:
        """Batches are bound in order, each to the model as those before it leave it; then that is undone."""
        yield

    @abstractmethod
    def bind(self, batch: Mapping[str, Any]) -> Bound:
        """Accept a batch: find (or make) the variant whose guards it satisfies."""

    def once_more(self, bound: Bound, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of a bound batch, to be run independently of those that it was bound to."""
        return bound.values

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

    def bytes_of(self, bound: Bound, names: Collection[str]) -> int:
        """Bytes of the values `names` that subgraphs hand on for a batch; 0 for what is not known beforehand."""
        return 0

    @abstractmethod
    def called(self, subgraph: int) -> Sequence[nn.Module]:
        """The modules that a subgraph calls itself: with all below them, the weights that it needs."""

    @contextmanager
    def sweeping(self, subgraph: int, *, again: bool) -> Iterator[None]:
        """All batches pass through a subgraph. If they will do so `again`, what it leaves on the model is undone.

        Raises:
            ModelError: it has changed a buffer of a module that another subgraph calls as well.
        """
        called = {str(i): m for i, m in enumerate(m for called in self.called(subgraph) for m in called.modules())}
        shared = [
            (f"{self._shared[id(module)]}.{key}", buffer, buffer._version)
            for module in called.values()
            if id(module) in self._shared
            for key, buffer in module.named_buffers(recurse=False)
        ]
        with ExitStack() as undoing:
            if again:
                undoing.enter_context(preserved_attributes(called))
                undoing.enter_context(saved_tensors()).save(self.buffers(subgraph))
            yield
            changed = [path for path, buffer, version in shared if buffer._version != version]
            if changed:
                raise out_of_step(f"its buffer {changed[0]} in place")

    @contextmanager
    def on_trial(self, subgraph: int) -> Iterator[None]:
        """What a subgraph writes to buffers of the model is undone: what it counts is counted once a batch."""
        with saved_tensors() as saved:
            saved.save(self.buffers(subgraph))
            yield

    @cached_property
    def _shared(self) -> Mapping[int, str]:
        """Modules that more than one subgraph calls, by id -> qualified name."""
        calls = (self.called(part.index) for part in self.parts(0))
        count = Counter(i for called in calls for i in {id(m) for each in called for m in each.modules()})
        return {id(m): name for name, m in self.model.named_modules() if count[id(m)] > 1}

    def buffers(self, subgraph: int) -> Sequence[torch.Tensor]:
        """What a subgraph may write to in place and leave for the next batch."""
        return [buffer for module in self.called(subgraph) for buffer in module.buffers()]

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
        self._kept: SavedTensors | None = None
        self._variants: Variants = partition.variants
        self._parts: dict[int, list[Part]] = {}

    @property
    def partition(self) -> Partition:
        """The partition of the first batch."""
        return self._variants.partitions[0]

    @contextmanager
    def binding(self) -> Iterator[None]:
        with preserved_attributes(dict(self.model.named_modules())), saved_tensors() as self._kept:
            yield
        self._kept = None

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        partition, bound = self._variants.bind(batch, self._kept)
        first, own = ([subgraph.targets for subgraph in p] for p in (self.partition, partition))
        if first != own:
            raise TraceError(
                "a batch takes another way through the sequential targets than the first one, so that subgraphs cannot "
                f"be calibrated on both: {own} instead of {first}. Calibrate on batches of one kind, or use the basic "
                "pipeline"
            )
        return Bound(self._variants.partitions.index(partition), bound.inputs, bound.signature)

    def buffers(self, subgraph: int) -> Sequence[torch.Tensor]:
        glue = {
            str(n.target): partition.traced.attribute(str(n.target))
            for partition in self._variants.partitions
            for n in partition[subgraph].written
        }
        return [*super().buffers(subgraph), *glue.values()]

    def parts(self, variant: int) -> Sequence[Part]:
        if variant not in self._parts:
            self._parts[variant] = self._make_parts(self._variants.partitions[variant])
        return self._parts[variant]

    def _make_parts(self, partition: Partition) -> list[Part]:
        if partition.shared_state:
            raise out_of_step(f"its buffer {partition.shared_state[0]} in place")
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

    def sizes(self, bound: Bound) -> dict[str, int]:
        """The size of each named dimension of a bound batch, such as `{"batch": 4, "sequence": 2048}`."""
        traced = self._variants.partitions[bound.variant].traced
        found: dict[str, int] = {}
        for name, fake in zip(traced.recording.inputs.names, traced.recording.inputs.values, strict=True):
            given = bound.values.get(name)
            if isinstance(fake, torch.Tensor) and isinstance(given, torch.Tensor):
                for symbolic, size in zip(fake.shape, given.shape, strict=True):
                    for symbol in traced.readable(symbolic).free_symbols:
                        found.setdefault(symbol.name, int(size))
        return found

    def bytes_of(self, bound: Bound, names: Collection[str]) -> int:
        sizes = self.sizes(bound)
        values = {n: v for subgraph in self._variants.partitions[bound.variant] for n, v in subgraph.values.items()}
        known = [values[name].bytes for name in names if name in values]
        return sum(int(b.subs({s: sizes.get(s.name, 1) for s in b.free_symbols})) for b in known)

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
        part = self._variants.partitions[variant][subgraph]
        outputs = part.run(values, signature)
        return {**outputs, **{name: outputs[name].clone() for name in part.borrowed}}

    @property
    def retraces(self) -> int:
        return self._variants.retraces


class WholeProgram(Program):
    """A model as one subgraph that is never looked into: nothing is traced, nothing propagated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kinds: list[tuple[tuple[str, ...], Any]] = []
        """Names and structure of the leaves of each kind of batch."""

    def bind(self, batch: Mapping[str, Any]) -> Bound:
        leaves, structure = flatten_batch(batch)
        names = tuple(map(path_name, paths_of(batch)))
        if (names, structure) not in self._kinds:
            self._kinds.append((names, structure))
        return Bound(self._kinds.index((names, structure)), dict(zip(names, leaves, strict=True)), ())

    def parts(self, variant: int) -> Sequence[Part]:
        return [Part(0, frozenset(name for name, _ in self.model.named_modules()), self.inputs(variant), ())]

    def inputs(self, variant: int) -> tuple[str, ...]:
        return self._kinds[variant][0] if self._kinds else ()

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
            names, structure = self._kinds[variant]
            self.model(**unflatten(structure, *(values[name] for name in names)))
        return {}
