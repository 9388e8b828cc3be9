"""The schedule of a calibration as data: a list of frozen steps that prints as text, and passes that rewrite it.

    calibrate   one pass over the batches through a subgraph, with modifiers observing it
    commit      statistics become new weights; no data
    propagate   one pass over the batches through the compressed subgraph, keeping what later subgraphs read
    load/unload a subgraph's weights begin to move to the device and back; what is computed meanwhile hides it

`naive_plan` writes the whole schedule down; `prune`, `free`, `place` and `overlap` turn it into the one that runs.
Nothing here touches a tensor; `fxcalib.executor` runs what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fxcalib.errors import PlanError
from fxcalib.modifiers.base import Needs

Kind = Literal["load", "calibrate", "commit", "propagate", "unload"]


@dataclass(frozen=True)
class Originals:
    """What a pass does with the values of the original model, which go through the subgraph before the others."""

    observed: bool
    """Whether a modifier looks at them."""
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of a plan, on one subgraph."""

    kind: Kind
    subgraph: int
    modifiers: tuple[int, ...] = ()
    """Positions of the modifiers that observe or commit."""
    modules: int = 0
    """How many modules they observe or commit."""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """Values that later steps read; a calibration writes only where no second pass follows."""
    frees: tuple[str, ...] = ()
    """Values that no later step reads."""
    originals: Originals | None = None
    """Each batch first passes through with the values of the original model, before anything is committed."""

    @property
    def sweeps(self) -> bool:
        """Whether this step passes over the batches."""
        return self.kind in ("calibrate", "propagate")

    def __str__(self) -> str:
        parts = [f"{self.kind:<9}  subgraph {self.subgraph}"]
        if self.modifiers:
            verb = "observing" if self.kind == "calibrate" else "compressing"
            plural = "" if self.modules == 1 else "s"
            parts.append(f"modifier {','.join(map(str, self.modifiers))} {verb} {self.modules} module{plural}")
        for name, values in (("reads", self.reads), ("writes", self.writes), ("frees", self.frees)):
            if values:
                parts.append(f"{name} {', '.join(values)}")
        if self.originals is not None:
            parts.append(f"originals first{', observed' if self.originals.observed else ''}")
            for name, values in (("writes", self.originals.writes), ("frees", self.originals.frees)):
                if values:
                    parts.append(f"{name} {', '.join(values)}")
        return "  ".join(parts)


@dataclass(frozen=True)
class Part:
    """What planning knows of a subgraph: names only."""

    index: int
    modules: frozenset[str]
    """Qualified names of all modules it runs, descendants included."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    changes: tuple[str, ...] = ()
    """Values among `reads` that it changes in place."""


@dataclass(frozen=True)
class Plan:
    """A schedule over `subgraphs` subgraphs."""

    steps: tuple[Step, ...]
    subgraphs: int
    inputs: tuple[str, ...]
    """Values that are there before the first step: what the batches hold."""

    @property
    def passes(self) -> int:
        """How many times the data passes through a subgraph."""
        return sum(step.sweeps for step in self.steps)

    def __str__(self) -> str:
        return self._text()

    def _text(self, wrong: int | None = None) -> str:
        head = f"plan: {self.subgraphs} subgraphs, {self.passes} passes, batches hold {', '.join(self.inputs)}"
        lines = [f"{i:>3}  {s}{'  <-- ERROR HERE' if i == wrong else ''}" for i, s in enumerate(self.steps)]
        return "\n".join([head, *lines])

    def verify(self) -> Plan:
        """Hold the schedule against its own rules; returns the plan.

        Raises:
            PlanError: a step reads a value that is not there, or commits what was not calibrated before; the message is
                the whole plan with the wrong step marked.
        """
        there, originals = set(self.inputs), set(self.inputs)
        for index, step in enumerate(self.steps):
            if step.originals is not None:
                lost = [name for name in (*step.reads, *step.originals.frees) if name not in originals]
                if lost:
                    raise PlanError(f"step {index} lacks the original {', '.join(lost)}\n{self._text(index)}")
                originals = (originals | set(step.originals.writes)) - set(step.originals.frees)
            missing = [name for name in step.reads if name not in there]
            if missing:
                raise PlanError(f"step {index} reads {', '.join(missing)}, never written or freed\n{self._text(index)}")
            there |= set(step.writes)
            unknown = [name for name in step.frees if name not in there]
            if unknown:
                raise PlanError(f"step {index} frees {', '.join(unknown)}, which is not there\n{self._text(index)}")
            there -= set(step.frees)
        return self


def naive_plan(
    parts: Sequence[Part], needs: Sequence[Needs], inputs: Iterable[str], *, propagate_error: bool = True
) -> Plan:
    """Calibrate k, commit k, propagate k, for each subgraph k; without `propagate_error`, propagate before commit.

    Modifiers that touch different modules of a subgraph share its passes; one that touches what an earlier one has
    changed gets a calibration of its own behind that commit. Where one observes the values of the original model as
    well, these pass through each subgraph in the calibration that it observes, else in the first pass.

    Raises:
        PlanError: a module that a modifier is to observe or compress lies in no subgraph.
    """
    lost = sorted({m for n in needs for m in n.observed | n.committed} - {m for p in parts for m in p.modules})
    if lost:
        raise PlanError(f"no subgraph holds {', '.join(lost)}: it cannot be calibrated; leave it to `ignore`")
    steps: list[Step] = []
    for part in parts:
        propagate = Step("propagate", part.index, reads=part.reads, writes=part.writes)
        steps.append(Step("load", part.index))
        begin = len(steps)
        if not propagate_error:
            steps.append(propagate)
        for group in _groups(part, needs):
            observed = len({m for i in group for m in needs[i].observed & part.modules})
            committed = len({m for i in group for m in needs[i].committed & part.modules})
            steps.append(Step("calibrate", part.index, group, observed, part.reads))
            steps.append(Step("commit", part.index, group, committed))
        if propagate_error:
            steps.append(propagate)
            if any(need.originals for need in needs):
                _pass_originals(steps, begin, part, needs)
        steps.append(Step("unload", part.index))
    return Plan(tuple(steps), len(parts), tuple(inputs))


def _pass_originals(steps: list[Step], begin: int, part: Part, needs: Sequence[Needs]) -> None:
    """Have the original values pass through with one of the passes from position `begin` on."""
    sweeps = [i for i in range(begin, len(steps)) if steps[i].sweeps]
    observing = [i for i in sweeps if any(needs[m].originals & part.modules for m in steps[i].modifiers)]
    chosen = (observing or sweeps)[0]
    steps[chosen] = replace(steps[chosen], originals=Originals(bool(observing), part.writes))


def _groups(part: Part, needs: Sequence[Needs]) -> list[tuple[int, ...]]:
    groups: list[tuple[int, ...]] = []
    touched: set[str] = set()
    for index, need in enumerate(needs):
        touches = (need.observed | need.committed) & part.modules
        if not touches:
            continue
        if groups and not touches & touched:
            groups[-1] = (*groups[-1], index)
        else:
            groups.append((index,))
            touched = set()
        touched |= touches
    return groups


def prune(plan: Plan) -> Plan:
    """Drop what changes nothing.

    No calibration without observed modules, no commit without committed ones; a calibration and a propagation of the
    same subgraph with nothing committed in between are one pass; no pass whose values nothing reads.
    """
    merged: list[Step] = []
    for step in plan.steps:
        if step.kind in ("calibrate", "commit") and not step.modules:
            continue
        before = merged[-1] if merged else None
        kinds = {step.kind, before.kind if before is not None else ""}
        if before is not None and before.subgraph == step.subgraph and kinds == {"calibrate", "propagate"}:
            calibrate, propagate = (step, before) if step.kind == "calibrate" else (before, step)
            originals = calibrate.originals or propagate.originals
            merged[-1] = replace(calibrate, writes=propagate.writes, originals=originals)
        else:
            merged.append(step)
    return replace(plan, steps=tuple(_without_dead(merged)))


def _without_dead(steps: Sequence[Step]) -> list[Step]:
    wanted: set[str] = set()
    wanted_originals: set[str] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        if step.sweeps:
            originals = step.originals
            if originals is not None:
                writes = tuple(name for name in originals.writes if name in wanted_originals)
                originals = replace(originals, writes=writes) if originals.observed or writes else None
            writes = tuple(name for name in step.writes if name in wanted)
            step = replace(step, writes=writes, originals=originals)
            if step.kind == "propagate" and not step.writes and originals is None:
                continue
            wanted |= set(step.reads)
            wanted_originals |= set() if originals is None else set(step.reads)
        kept.append(step)
    kept.reverse()
    busy = {step.subgraph for step in kept if step.kind not in ("load", "unload")}
    return [step for step in kept if step.subgraph in busy]


def free(plan: Plan) -> Plan:
    """Free every value with the last step that reads it, and what nothing reads with the first pass."""
    frees = _last_readers(plan, [i for i, step in enumerate(plan.steps) if step.sweeps])
    originals = _last_readers(plan, [i for i, step in enumerate(plan.steps) if step.originals is not None])
    steps = []
    for i, step in enumerate(plan.steps):
        own = step.originals and replace(step.originals, frees=originals.get(i, ()))
        steps.append(replace(step, frees=frees.get(i, ()), originals=own))
    return replace(plan, steps=tuple(steps))


def _last_readers(plan: Plan, passes: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Of these positions of steps, which reads which values last; inputs that none reads count for the first."""
    if not passes:
        return {}
    last = {name: index for index in passes for name in plan.steps[index].reads}
    for name in plan.inputs:
        last.setdefault(name, passes[0])
    found: dict[int, tuple[str, ...]] = {}
    for name, index in last.items():
        found[index] = (*found.get(index, ()), name)
    return found


def place(plan: Plan, *, resident: bool) -> Plan:
    """Drop the moves of weights where all weights already lie on the device that computes."""
    if not resident:
        return plan
    return replace(plan, steps=tuple(s for s in plan.steps if s.kind not in ("load", "unload")))


def overlap(plan: Plan) -> Plan:
    """Begin to load weights one step early: before the last step of the subgraph that runs before, which hides it."""
    steps: list[Step] = []
    for step in plan.steps:
        at = len(steps)
        if step.kind == "load":
            working = [i for i, before in enumerate(steps) if before.kind not in ("load", "unload")]
            passes = [i for i in working if steps[i].sweeps and steps[i].subgraph == steps[working[-1]].subgraph]
            at = (passes or working or [at])[-1]
        steps.insert(at, step)
    return replace(plan, steps=tuple(steps))


def make_plan(
    parts: Sequence[Part],
    needs: Sequence[Needs],
    inputs: Iterable[str],
    *,
    resident: bool = True,
    propagate_error: bool = True,
) -> Plan:
    """The schedule that runs: `naive_plan` after all passes, verified."""
    plan = naive_plan(parts, needs, inputs, propagate_error=propagate_error)
    return overlap(place(free(prune(plan)), resident=resident)).verify()
