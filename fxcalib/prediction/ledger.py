"""Adds up who holds how many bytes in each tier at each step of a plan, and what moves between the tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxcalib.planning import Part, Plan
from fxcalib.prediction.rehearsal import Rehearsed
from fxcalib.prediction.saving import Saved
from fxcalib.prediction.solving import Committed
from fxcalib.transfers import AHEAD


@dataclass(frozen=True)
class Moment:
    """The most that is held at once in one step, in bytes by what it is for."""

    step: int | None
    """Position in the plan; None before and after it."""
    name: str
    """`load`, a step such as `calibrate subgraph 3`, or `save`."""
    host: Mapping[str, int]
    device: Mapping[str, int]
    """Empty where the CPU computes."""

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class Moved:
    """Bytes that cross from one tier to another during the whole run."""

    disk_to_host: int = 0
    host_to_device: int = 0
    device_to_host: int = 0
    host_to_disk: int = 0


@dataclass(frozen=True)
class Facts:
    """All byte counts that the ledger adds up."""

    weights: int
    """Parameters and buffers of the model, quantization parameters included."""
    called: Sequence[int]
    """Weights that each subgraph needs."""
    values: Mapping[str, tuple[int, int]]
    """Value -> bytes of the first batch, and of all batches."""
    rehearsed: Mapping[tuple[int, str], Rehearsed]
    committed: Mapping[int, Committed]
    """Position of the commit step -> what it takes."""
    saved: Saved | None
    """None where nothing is saved."""
    on_device: bool
    """Whether an accelerator computes."""
    stored_on_device: bool
    """Whether intermediates stay there."""
    workspace: int = 0
    """What the device's library of matrix products keeps for itself."""


@dataclass
class _Books:
    facts: Facts
    inputs: frozenset[str]
    stored: set[str] = field(default_factory=set)
    originals: set[str] = field(default_factory=set)
    """Values that are stored as the original model has them, too."""
    loaded: int = 0
    statistics: int = 0

    def stored_bytes(self) -> int:
        # the caller keeps the batches themselves; what is stored of them on the host are the same tensors
        given = frozenset[str]() if self.facts.stored_on_device else self.inputs
        own = [*(self.stored - given), *(self.originals - given)]
        return sum(self.facts.values[name][1] for name in own)

    def moment(self, step: int | None, name: str, stored: int, working: int, copies: int = 0) -> Moment:
        facts = self.facts
        batches = sum(facts.values[n][1] for n in self.inputs)
        host = {"weights": facts.weights, "batches": batches}  # those on a device keep their place on the host
        device: dict[str, int] = {}
        if facts.on_device:
            device = {"weights": self.loaded, "statistics": self.statistics, "working": working, "copies": copies}
            device["workspace"] = facts.workspace
            (device if facts.stored_on_device else host)["stored"] = stored
        else:
            host |= {"stored": stored, "statistics": self.statistics, "working": working + copies}
        return Moment(step, name, _without_zeros(host), _without_zeros(device))


def moments(plan: Plan, parts: Sequence[Part], facts: Facts) -> tuple[Moment, ...]:
    """What is held in each step, in order, with loading before and saving after."""
    books = _Books(facts, frozenset(plan.inputs))
    found = [Moment(None, "load", _without_zeros({"weights": facts.weights}), {})]
    books.stored = set(plan.inputs) if plan.passes else set()
    books.originals = set(plan.inputs) if any(step.originals for step in plan.steps) else set()
    if facts.on_device and all(step.kind != "load" for step in plan.steps):
        books.loaded = facts.weights
    for index, step in enumerate(plan.steps):
        name = f"{step.kind} subgraph {step.subgraph}"
        if step.kind in ("load", "unload"):
            weights = facts.called[step.subgraph]
            books.loaded += weights if step.kind == "load" else -weights
            found.append(books.moment(index, name, books.stored_bytes(), 0))
        elif step.sweeps:
            rehearsed = facts.rehearsed[step.subgraph, step.kind]
            before = books.stored_bytes()
            books.stored = (books.stored | set(step.writes)) - set(step.frees)
            if step.originals is not None:
                books.originals = (books.originals | set(step.originals.writes)) - set(step.originals.frees)
            if step.kind == "calibrate":
                books.statistics = rehearsed.statistics_bytes
            again = any(s.sweeps and s.subgraph == step.subgraph for s in plan.steps[index + 1 :])
            copies = sum(facts.values[n][0] for n in parts[step.subgraph].changes) if again else 0
            if facts.on_device and not facts.stored_on_device:
                # the next batch arrives while this one runs, and up to AHEAD are queued behind what the device does
                copies += (AHEAD + 2) * sum(facts.values[n][0] for n in step.reads)
                copies += (AHEAD + 1) * sum(facts.values[n][0] for n in step.writes)
            stored = max(before, books.stored_bytes())
            found.append(books.moment(index, name, stored, rehearsed.working_bytes, copies))
        else:
            found.append(books.moment(index, name, books.stored_bytes(), facts.committed[index].working_bytes))
            books.statistics = 0
    if facts.saved is not None:
        books.loaded, books.statistics = 0, 0
        last = books.moment(None, "save", 0, 0)
        host = {**last.host, "compressed": facts.saved.held_bytes, "working": facts.saved.working_bytes}
        found.append(Moment(None, "save", _without_zeros(host), {}))
    return tuple(found)


def moved(plan: Plan, facts: Facts) -> Moved:
    """What crosses between the tiers. Weights are read from the disk once."""
    to_device = to_host = 0
    for step in plan.steps if facts.on_device else ():
        weights = facts.called[step.subgraph]
        to_device += weights * (step.kind == "load")
        to_host += weights * (step.kind == "unload")
        if not facts.stored_on_device:
            own = step.originals
            to_device += sum(facts.values[n][1] for n in step.reads) * (1 if own is None else 2)
            to_host += sum(facts.values[n][1] for n in (*step.writes, *(() if own is None else own.writes)))
    written = 0 if facts.saved is None else facts.saved.disk_bytes
    return Moved(facts.weights, to_device, to_host, written)


def _without_zeros(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
