"""A dry run as text: repeated subgraphs are folded, so that a plan of 80 layers is one page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fxcalib.prediction.dry_run import CarriedValue, DryRun, SubgraphPlan, folded
from fxcalib.prediction.ledger import Moment
from fxcalib.report import format_bytes, format_seconds

_SHOWN = 6
_NUMBER = re.compile(r"\d+")


def describe(run: DryRun) -> str:
    """The whole dry run, one fact a line."""
    kind = "padded" if run.padded else "packed"
    lines = [
        f"plan of {run.model}: {run.algorithm}, {run.pipeline} pipeline on {run.device}",
        f"  {_count(run.parameters)} parameters, {format_bytes(run.weight_bytes)} in {run.dtype} "
        "with scales and zero points",
    ]
    if run.note:
        lines.append(f"  {run.note}")
    if run.plan.passes:
        lines.append(
            f"  {run.samples} samples of {run.seq_len} tokens, {kind}, in {run.batches} batches of {run.batch_size}; "
            f"each holds {', '.join(map(str, run.inputs))}"
        )
    for first, many in folded(run.subgraphs):
        lines += ["", *_subgraph(first, many, run)]
    lines += ["", f"steps: {run.plan.passes} passes over {run.batches if run.plan.passes else 0} batches"]
    lines += ["  " + line for line in _steps(run)]
    lines += ["", "peaks"]
    lines += [f"  {tier:<7} {_peak(run, tier)}" for tier in ("device", "host")]
    lines.append(f"  disk    {format_bytes(run.disk_bytes)}: the checkpoint" if run.disk_bytes else "  disk    nothing")
    crossed = run.moved
    lines += [
        "moved",
        f"  disk to host {format_bytes(crossed.disk_to_host)}, host to device {format_bytes(crossed.host_to_device)}, "
        f"device to host {format_bytes(crossed.device_to_host)}, host to disk {format_bytes(crossed.host_to_disk)}",
    ]
    if run.saved_by_recomputing:
        lines.append(f"saved by computing again instead of storing: {format_bytes(run.saved_by_recomputing)}")
    lines.append(f"work: {_count(run.flops)}FLOP")
    lines.append(
        "time: not estimated; --calibrate-machine measures this machine once"
        if run.seconds is None
        else f"time: about {format_seconds(run.seconds)} of calibration, from this machine's measured rates"
    )
    return "\n".join(lines)


def _subgraph(subgraph: SubgraphPlan, many: int, run: DryRun) -> list[str]:
    other = run.subgraphs[subgraph.index + many - 1]
    where = f"subgraph {subgraph.index}" if many == 1 else f"subgraphs {subgraph.index}-{other.index}, each"
    lines = [f"{where}: {_names(_all_folded(subgraph.modules, other.modules))}"]
    if subgraph.compressed or subgraph.observed:
        lines.append(f"  observes {subgraph.observed} and compresses {subgraph.compressed} modules")
    lines.append(f"  weights {format_bytes(subgraph.weight_bytes)}")
    if subgraph.reads:
        lines.append(f"  reads {', '.join(_all_folded(subgraph.reads, other.reads))}")
    lines += [f"  stores {_value(a, b)}" for a, b in zip(subgraph.carries, other.carries, strict=True)]
    lines += [
        f"  computes again {value}, {format_bytes(value.batch_bytes)} a batch: "
        f"storing it would take {format_bytes(value.total_bytes)}"
        for value in subgraph.recomputes
    ]
    if subgraph.frees:
        lines.append(f"  frees {', '.join(_all_folded(subgraph.frees, other.frees))}")
    if subgraph.working_bytes or subgraph.commit_bytes:
        lines.append(
            f"  takes {format_bytes(subgraph.working_bytes)} for the activations of a batch, "
            f"{format_bytes(subgraph.statistics_bytes)} for statistics, {format_bytes(subgraph.commit_bytes)} to commit"
        )
    return lines


def _value(value: CarriedValue, last: CarriedValue) -> str:
    """A stored value, and the one that the last of the folded subgraphs stores in its place."""
    shown = _folded(str(value), str(last))
    if not value.total_bytes:
        return shown
    until = "" if value.freed_after is None or last is not value else f", until subgraph {value.freed_after}"
    return f"{shown}, {format_bytes(value.batch_bytes)} a batch, {format_bytes(value.total_bytes)} in all{until}"


def _steps(run: DryRun) -> list[str]:
    """The steps; those of repeated subgraphs once."""
    lines = []
    for first, many in folded(run.subgraphs):
        own = [(i, s) for i, s in enumerate(run.plan.steps) if s.subgraph == first.index]
        end = first.index + many - 1
        for index, step in own:
            where = f"subgraph {first.index}" if many == 1 else f"subgraphs {first.index}-{end}, each"
            moment = next(m for m in run.moments if m.step == index)
            text = f"{step.kind:<9}  {where}"
            if step.modules:
                text += f"  {step.modules} modules"
            if step.writes:
                text += f"  writes {', '.join(_all_folded(step.writes, _writes(run, end, step.kind)))}"
            device = f", device {format_bytes(moment.device_bytes)}" if moment.device else ""
            lines.append(f"{text}  host {format_bytes(moment.host_bytes)}{device}")
    return lines


def _peak(run: DryRun, tier: str) -> str:
    moment: Moment = run.peak(tier)
    parts = moment.host if tier == "host" else moment.device
    if not parts:
        return "nothing" if tier == "device" else "0 B"
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{format_bytes(sum(parts.values()))}, at {moment.name}: {listed}"


def _folded(first: str, last: str) -> str:
    """Two names that differ in numbers as one: `layers.{1..79}`."""
    numbers = iter(_NUMBER.findall(last))

    def join(match: re.Match[str]) -> str:
        end = next(numbers, match[0])
        return match[0] if end == match[0] else f"{{{match[0]}..{end}}}"

    return _NUMBER.sub(join, first)


def _all_folded(first: Sequence[str], last: Sequence[str]) -> list[str]:
    return [_folded(a, b) for a, b in zip(first, last, strict=True)]


def _writes(run: DryRun, subgraph: int, kind: str) -> tuple[str, ...]:
    return next(s.writes for s in run.plan.steps if s.subgraph == subgraph and s.kind == kind)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "glue only"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} Z"
