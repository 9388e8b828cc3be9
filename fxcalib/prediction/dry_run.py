"""A run that loads no weights: what a calibration would do, hold and move, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxcalib.planning import Plan
from fxcalib.prediction.ledger import Moment, Moved
from fxcalib.report import plain

TIERS = ("device", "host")


@dataclass(frozen=True)
class CarriedValue:
    """A value that crosses from one subgraph to later ones."""

    name: str
    shape: tuple[str, ...] | None
    """Sizes in `batch`, `sequence`, ...; None for anything but a tensor."""
    dtype: str | None
    batch_bytes: int
    """Bytes of it for one batch of full size."""
    total_bytes: int
    """Bytes of it for all batches."""
    stored: bool
    """Whether it is kept for every batch; else each subgraph that reads it computes it again."""
    freed_after: int | None
    """The last subgraph that reads it."""

    def __str__(self) -> str:
        if self.shape is None:
            return self.name
        return f"{self.name}: {self.dtype}[{', '.join(self.shape)}]"


@dataclass(frozen=True)
class SubgraphPlan:
    """What one subgraph runs, carries and takes."""

    index: int
    like: int
    """The first subgraph that takes the same; the own index where it is the first."""
    modules: tuple[str, ...]
    """Qualified names of the modules it calls, in call order."""
    observed: int
    """How many modules are observed on data."""
    compressed: int
    """How many modules are compressed."""
    weight_bytes: int
    reads: tuple[str, ...]
    carries: tuple[CarriedValue, ...]
    """What it makes for later subgraphs."""
    recomputes: tuple[CarriedValue, ...]
    """What it computes again for its modules, which an earlier subgraph computed too."""
    frees: tuple[str, ...]
    working_bytes: int
    """Most bytes of activations and temporaries of one batch, in the pass that takes more."""
    statistics_bytes: int
    """Hessians and ranges that are held until the commit."""
    commit_bytes: int
    """Most bytes of temporaries of the commit."""
    flops: int
    """Floating-point operations of all passes and commits."""


@dataclass(frozen=True)
class DryRun:
    """What a calibration would do. Prints as text; `to_dict` is the same as data."""

    model: str
    pipeline: str
    algorithm: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    """All parameters and buffers, quantization parameters included."""
    samples: int
    batch_size: int
    batches: int
    seq_len: int
    padded: bool
    """Whether samples are padded; packed samples never are."""
    inputs: tuple[CarriedValue, ...]
    """What the batches hold."""
    subgraphs: tuple[SubgraphPlan, ...]
    plan: Plan
    moments: tuple[Moment, ...]
    """What is held in each step; the first is loading, the last saving where something is saved."""
    moved: Moved
    disk_bytes: int
    """Size of the checkpoint that is written."""
    saved_by_recomputing: int
    """Bytes of all batches that would be stored if nothing was computed again."""
    flops: int
    """Floating-point operations of matrix products, attention and solvers, two for a multiply-add."""
    seconds: float | None
    """Estimated time of calibration; None where this machine was not measured."""
    note: str = ""
    """What is planned instead of what was asked for, and why."""

    def peak(self, tier: str) -> Moment:
        """The first moment at which the most bytes are held in `tier`, `host` or `device`."""
        return max(self.moments, key=lambda m: m.host_bytes if tier == "host" else m.device_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `peaks` says for each tier bytes, step, and what they are for."""
        data = asdict(self)
        data["steps"] = [asdict(step) for step in self.plan.steps]
        data["passes"] = self.plan.passes
        del data["plan"]
        data["peaks"] = {"disk": {"bytes": self.disk_bytes}, **{tier: self._peak_data(tier) for tier in TIERS}}
        return dict(plain(data))

    def _peak_data(self, tier: str) -> dict[str, Any]:
        moment = self.peak(tier)
        parts: Mapping[str, int] = moment.host if tier == "host" else moment.device
        return {"bytes": sum(parts.values()), "step": moment.step, "name": moment.name, "parts": dict(parts)}

    def __str__(self) -> str:
        from fxcalib.prediction.text import describe

        return describe(self)


def folded(subgraphs: Sequence[SubgraphPlan]) -> list[tuple[SubgraphPlan, int]]:
    """Runs of neighbouring subgraphs that take the same: the first of each and how many they are."""
    runs: list[tuple[SubgraphPlan, int]] = []
    for subgraph in subgraphs:
        if runs and runs[-1][0].like == subgraph.like and _alike(runs[-1][0], subgraph):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((subgraph, 1))
    return runs


def _alike(a: SubgraphPlan, b: SubgraphPlan) -> bool:
    """Whether two neighbours print the same but for numbers in names: they read, carry and free as much."""
    counts = [(len(s.modules), len(s.reads), len(s.frees), [v.batch_bytes for v in s.carries]) for s in (a, b)]
    return counts[0] == counts[1]
