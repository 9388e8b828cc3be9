"""The tools that are scored, behind one seam: a model cut at its targets, to be run on any batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Cut(ABC):
    """A model cut into subgraphs by a tool."""

    innermost = False
    """Whether of targets within each other the innermost count, instead of the outermost."""
    whole_output = True
    """Whether it makes all that the model returns; else only the main output is compared, such as logits."""

    @property
    @abstractmethod
    def calls(self) -> list[list[int]]:
        """For each subgraph the targets that it calls, by `id` of the module, in order."""

    @abstractmethod
    def run(self, batch: Mapping[str, Any]) -> Any:
        """Run the subgraphs one after another; what the model returns."""

    @property
    def retraces(self) -> int:
        """How many batches had to be traced anew."""
        return 0


class Tool(ABC):
    """Cuts models."""

    @abstractmethod
    def cut(self, model: nn.Module, batch: Mapping[str, Any], targets: Sequence[str]) -> Cut:
        """Cut `model` so that each call of one of `targets` (class names) is alone in a subgraph."""


class Fxcalib(Tool):
    """`fxcalib.trace` and `fxcalib.partition`."""

    def cut(self, model: nn.Module, batch: Mapping[str, Any], targets: Sequence[str]) -> Cut:
        import fxcalib

        return FxcalibCut(fxcalib.partition(fxcalib.trace(model, batch, targets)))


class FxcalibCut(Cut):
    """A partition, which traces batches anew by itself."""

    def __init__(self, partition: Any) -> None:
        self.partition = partition

    @property
    def calls(self) -> list[list[int]]:
        model = self.partition.traced.model
        return [[id(model.get_submodule(name)) for name in subgraph.targets] for subgraph in self.partition]

    def run(self, batch: Mapping[str, Any]) -> Any:
        return self.partition.run(batch)

    @property
    def retraces(self) -> int:
        return int(self.partition.variants.retraces)


class Suspended(Tool):
    """fxcalib without a trace: the model's own forward, waiting at each target."""

    def cut(self, model: nn.Module, batch: Mapping[str, Any], targets: Sequence[str]) -> Cut:
        from fxcalib.suspended import SuspendedProgram
        from fxcalib.tracing import resolve_targets

        return SuspendedCut(SuspendedProgram(model, resolve_targets(model, targets), batch))


class SuspendedCut(Cut):
    """The forwards of a model, one target call after another."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self._count = len(program.parts(0))

    @property
    def calls(self) -> list[list[int]]:
        model = self.program.model
        return [[id(model.get_submodule(name)) for name in self.program.targets(k)] for k in range(self._count)]

    def run(self, batch: Mapping[str, Any]) -> Any:
        results: list[Any] = []
        # the program only calibrates, so that nobody asks it for what the forward returns
        handle = self.program.model.register_forward_hook(lambda module, inputs, result: results.append(result))
        try:
            bound = self.program.bind(batch)
            values: Mapping[str, Any] = bound.values
            with torch.no_grad():
                for k in range(self._count):
                    values = self.program.run(bound.variant, k, values, bound.signature, wanted=tuple(values))
        finally:
            handle.remove()
        return results[-1]


def tool(name: str) -> Tool:
    """The tool of a name in `TOOLS`; a peer is imported here, and must be installed."""
    if name == "llmcompressor":
        from benchmarks.zoo.peer import LLMCompressor

        return LLMCompressor()
    return {"fxcalib": Fxcalib, "suspended": Suspended}[name]()


TOOLS = ("fxcalib", "suspended", "llmcompressor")
