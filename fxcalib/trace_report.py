"""`fxcalib trace`: from a model's name to what its trace holds and assumes, or to why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxcalib.explanation import Explanation, explain, short_path
from fxcalib.loading import load, load_skeleton
from fxcalib.partitioning import Partition, partition
from fxcalib.tracing import Guard, TraceError, trace
from fxcalib.verification import Comparison, sizes_of, verify
from fxcalib.viz.command import read_batch
from fxcalib.viz.sample import sample_batch

_FEW = 8
"""Targets that are named one by one."""
_VERIFIED_LENGTH = 128


@dataclass(frozen=True)
class SubgraphLine:
    """One subgraph, as it is listed."""

    targets: tuple[str, ...]
    modules: int
    glue: int
    carries: str
    """Bytes that it hands on, in sizes of the batch."""


@dataclass(frozen=True)
class TraceReport:
    """What the trace of one model holds."""

    model: str
    type: str
    batch: str
    """Sizes of the tensors that it was traced with."""
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    """Qualified names of the sequential targets."""
    module_calls: int
    glue: int
    subgraphs: tuple[SubgraphLine, ...]
    guards: tuple[Guard, ...]
    seconds: float
    verified: tuple[Comparison, ...] = ()
    """Empty where the model was not run."""

    @property
    def exact(self) -> bool:
        """Whether no comparison found a difference."""
        return all(comparison.identical for comparison in self.verified)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        verified = [{**asdict(c), "identical": c.identical} for c in self.verified]
        return {"traced": True, **asdict(self), "verified": verified}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model} ({self.type}) is traced in {self.seconds:.2f} s, on a batch of {self.batch}"
        few = self.targets if len(self.targets) <= _FEW else (*self.targets[:3], "...", self.targets[-1])
        yield f"targets    {', '.join(self.patterns)}: {_count(len(self.targets), 'module')}, {', '.join(few)}"
        calls, glue = _count(self.module_calls, "module call"), _count(self.glue, "operation")
        yield f"nodes      {calls}, {glue} of glue between them"
        yield f"subgraphs  {len(self.subgraphs)}"
        for index, first, last in _runs(self.subgraphs):
            named = ", ".join(first.targets) if first is last else f"{first.targets[0]} to {last.targets[-1]}"
            each = "" if first is last else " each"
            calls = f"{_count(first.modules, 'module call')}, {_count(first.glue, 'operation')}"
            yield f"  {index}: {named or 'what follows'}: {calls}, carries {first.carries} bytes on{each}"
        yield f"guards     {len(self.guards)}, what the trace assumes of a batch; one that breaks them is traced anew"
        for guard in self.guards:
            yield f"  [{guard.kind}] {guard.text}"
            if ": " in guard.source:
                yield f"      {short_path(guard.source)}"
        for comparison in self.verified:
            yield f"{'exact' if comparison.identical else 'WRONG'}      {comparison}"
        if len(self.verified) == 1:
            yield "           no batch of other sizes that the model takes could be made of this one"
        if not self.verified:
            yield "exact      not looked at: --verify loads the weights and compares with the model"


def trace_command(
    model: str,
    *,
    targets: list[str] | None = None,
    targets_per_subgraph: int = 1,
    batch_file: Path | None = None,
    seq_len: int | None = None,
    batch_size: int = 2,
    check: bool = False,
    trust_remote_code: bool = False,
) -> TraceReport | Explanation:
    """Trace `model`, a folder or a hub id. Returns what its trace holds, or why there is none.

    Args:
        targets, targets_per_subgraph: as `trace` and `partition` take them.
        batch_file: keyword arguments of the model, saved with `torch.save`; default: made from the config, of
            `batch_size` samples of `seq_len` tokens, by default 128 where the model is run.
        check: load the weights, and compare the subgraphs with the model on this batch and on one of other sizes.

    Raises:
        FxcalibError: the model, an option or a file is wrong, or the model itself fails on the batch.
    """
    if check:
        module = load(model, trust_remote_code=trust_remote_code).model
    else:
        module = load_skeleton(model, trust_remote_code=trust_remote_code)
    if batch_file is not None:
        batch = read_batch(batch_file)
    else:
        batch = sample_batch(module, batch=batch_size, sequence=seq_len or (_VERIFIED_LENGTH if check else None))
    try:
        parts = partition(trace(module, batch, targets), targets_per_subgraph)
        verified = verify(parts, batch) if check else ()
    except TraceError:
        return explain(module, batch, targets)
    folder = Path(model).expanduser()
    return report_of(parts, folder.resolve().name if folder.is_dir() else model, sizes_of(batch), verified)


def report_of(parts: Partition, name: str, batch: str, verified: tuple[Comparison, ...] = ()) -> TraceReport:
    """The report of a partition."""
    traced = parts.traced
    nodes = traced.graph.nodes
    subgraphs = tuple(
        SubgraphLine(
            targets=subgraph.targets,
            modules=len(subgraph.modules),
            glue=sum(n.op == "call_function" for n in subgraph.nodes),
            carries=str(sum(subgraph.values[output].bytes for output in subgraph.outputs)),
        )
        for subgraph in parts
    )
    return TraceReport(
        model=name,
        type=type(traced.model).__name__,
        batch=batch,
        patterns=traced.targets.patterns,
        targets=traced.targets.names,
        module_calls=sum(n.op == "call_module" for n in nodes),
        glue=sum(n.op == "call_function" for n in nodes),
        subgraphs=subgraphs,
        guards=traced.guards,
        seconds=traced.seconds,
        verified=verified,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _runs(subgraphs: tuple[SubgraphLine, ...]) -> Iterator[tuple[str, SubgraphLine, SubgraphLine]]:
    """Neighbours that differ only in the names of their targets, as one: indices, the first and the last."""
    start = 0
    for index, subgraph in enumerate(subgraphs):
        following = subgraphs[index + 1] if index + 1 < len(subgraphs) else None
        if following is None or not (following.targets and subgraph.targets) or not _alike(subgraph, following):
            yield f"{start}" if start == index else f"{start}-{index}", subgraphs[start], subgraph
            start = index + 1


def _alike(one: SubgraphLine, other: SubgraphLine) -> bool:
    return (one.modules, one.glue, one.carries) == (other.modules, other.glue, other.carries)
