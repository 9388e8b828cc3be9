"""What a compression algorithm is to the rest of fxcalib: a few methods that the executor calls, nothing else.

A modifier never loops over batches, never moves tensors between devices and keeps no global state. The executor calls

    attach(model)                    once, before anything runs
    prepare(model, batch, device)    once, before planning, with the first batch; only where a modifier needs data
    with observe(scope): ...         around the calibration pass of each subgraph; hooks live only inside
    commit(scope)                    after that pass: statistics -> new weights and quantization parameters
    detach(model)                    once, at the end
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Needs:
    """What an attached modifier asks of the schedule. Names are qualified module names of the model."""

    observed: frozenset[str] = frozenset()
    """Modules whose calls must be observed on data before `commit`."""
    committed: frozenset[str] = frozenset()
    """Modules that `commit` changes."""
    originals: frozenset[str] = frozenset()
    """Of the observed modules, those whose calls on the values of the original model are to be observed as well."""


@dataclass
class CurrentBatch:
    """The batch that is running: the executor writes it before each forward, hooks read it."""

    index: int = -1
    """Position in the calibration data, from 0."""
    token_mask: torch.Tensor | None = None
    """(batch, sequence) bool, true where a token is real; None where nothing is padded."""
    original: bool = False
    """Whether its values are those of the original model; the calls on those of the compressed one follow."""


@dataclass(frozen=True)
class Scope:
    """What a modifier may see while one subgraph is calibrated."""

    model: nn.Module
    index: int
    """Number of the subgraph, from 0."""
    modules: Mapping[str, nn.Module]
    """Every module that the subgraph runs, in call order, descendants included: qualified name -> module."""
    batch: CurrentBatch = field(default_factory=CurrentBatch)


@dataclass(frozen=True)
class ModuleResult:
    """What `commit` did to one module."""

    name: str
    """Qualified module name."""
    scheme: str
    """Readable scheme, such as `int4 group 64 symmetric`."""
    error: float | None
    """Relative squared error, 0 for none; None where it was not measured."""
    measure: str
    """What `error` is relative to: `output` (activations of the calibration data), `output (diagonal)` (the same, if
    the channels of the inputs were uncorrelated) or `weight`."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What went another way than asked, such as `damping raised to 0.1: Hessian was singular`."""


class Modifier(ABC):
    """A compression algorithm. Subclasses hold their settings and, between `attach` and `detach`, their statistics."""

    sequential_targets: Sequence[str] | None = None
    """Modules that it wants the model to be cut at; None leaves that to others."""
    tracing_ignore: Sequence[str] = ()
    """Modules that it wants to be kept whole in the trace."""
    survey: Modifier | None = None
    """Another modifier that looks at the whole original model before this one begins; it commits nothing."""
    arguments: Mapping[str, Any]
    """What it was made with, by keyword, as a recipe names it."""

    def __new__(cls, *positional: Any, **arguments: Any) -> Self:
        modifier = super().__new__(cls)
        modifier.arguments = arguments
        return modifier

    @property
    @abstractmethod
    def needs_data(self) -> bool:
        """Whether calibration data is needed at all; known before `attach`."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the attached modifier asks of the schedule; valid after `attach`."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Resolve targets and put schemes and quantization parameters onto modules."""

    def prepare(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> None:  # noqa: B027
        """Learn what it has to of how `model(**batch)` runs on `device`; `needs` may change, nothing else.

        Weights may lie on the meta device. Most modifiers know all that they need once they are attached.
        """

    @abstractmethod
    def observe(self, scope: Scope) -> AbstractContextManager[None]:
        """Collect statistics of the scope's modules while the context is open."""

    @abstractmethod
    def commit(self, scope: Scope) -> list[ModuleResult]:
        """Turn statistics into the new weights and quantization parameters of the scope's modules."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Freeze what was attached; drop all statistics."""
