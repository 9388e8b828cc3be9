"""What the executor tells whoever watches. The base class ignores it all; the command line draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxcalib.modifiers.base import ModuleResult


class Progress:
    """Receives the events of one run, in order. Override what you want to show."""

    def phase(self, name: str) -> None:
        """A phase of the whole job begins: `load`, `trace`, `calibrate`, `save`, `evaluate`, ..."""

    def plan(self, subgraphs: int, passes: int, batches: int) -> None:
        """The schedule is known: `passes` passes over `batches` batches are to come, over `subgraphs` subgraphs."""

    def sweep(self, subgraph: int, kind: str, batches: int) -> None:
        """A pass `calibrate` or `propagate` over `batches` batches begins on subgraph number `subgraph`, from 0."""

    def batch(self, tokens: int) -> None:
        """One batch of the current pass, of `tokens` tokens, is done."""

    def module(self, result: ModuleResult) -> None:
        """One module was compressed."""

    def subgraph(self, subgraph: int, seconds: float) -> None:
        """Nothing more is to be done with subgraph number `subgraph`; all steps on it took `seconds`."""

    def close(self) -> None:
        """Nothing more will come, after success or failure; may be called twice."""
