"""What a picture of a partition shows, as plain frozen values: this is the `.json` of `fxcalib graph`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxcalib.report import plain

Kind = Literal["input", "target", "module", "glue", "weight", "constant", "output"]

FORMAT = 2
"""Version of the JSON; it changes when a field is removed or changes its meaning."""


@dataclass(frozen=True)
class ValueView:
    """A value on an edge."""

    name: str
    dtype: str
    """Such as `bfloat16`; empty for what is not a tensor."""
    shape: tuple[str, ...] | None
    """Sizes in `batch`, `sequence`, ...; None for what is not a tensor."""
    expression: str
    """Bytes as an expression of the same sizes."""
    bytes: int | None
    """Bytes at the sizes of the view; None where a size depends on data."""

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.shape)}]" if self.shape is not None else "object"


@dataclass(frozen=True)
class NodeView:
    """One node; glue that several subgraphs compute again is a node in each of them."""

    id: str
    """Unique: the number of the subgraph and the name of the graph node."""
    subgraph: int | None
    """None for what the batch holds and for the model's result."""
    kind: Kind
    name: str
    """Qualified module name, name of the ATen operation, or key of the batch."""
    type: str
    """Class of a module; empty for all else."""
    parameters: int
    bytes: int
    """Bytes of the parameters and buffers."""
    source: str
    """The model's source line of a glue operation: `file:line: text`."""
    value: ValueView


@dataclass(frozen=True)
class EdgeView:
    """A value that one node makes and another reads."""

    source: str
    target: str
    value: ValueView
    crosses: bool
    """Whether the value is carried from one subgraph, or from the batch, to another."""


@dataclass(frozen=True)
class MeasuredModule:
    """What a run's report says of one compressed module."""

    name: str
    scheme: str
    error: float | None
    """Relative squared error; None where it was not measured."""
    measure: str
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MeasuredSubgraph:
    """What a run's report says of one subgraph, in seconds."""

    calibrate_seconds: float
    commit_seconds: float
    propagate_seconds: float
    modules: tuple[MeasuredModule, ...]


@dataclass(frozen=True)
class InnerModule:
    """A module inside of one that the graph calls."""

    name: str
    type: str


@dataclass(frozen=True)
class SubgraphView:
    """A stretch of the graph that runs in one go."""

    index: int
    targets: tuple[str, ...]
    modules: tuple[str, ...]
    """Qualified names of all modules it calls."""
    inside: tuple[InnerModule, ...]
    """The modules inside of those."""
    nodes: tuple[str, ...]
    """Ids of its nodes, in running order."""
    inputs: tuple[ValueView, ...]
    outputs: tuple[ValueView, ...]
    frees: tuple[str, ...]
    parameters: int
    bytes: int
    """Bytes of its parameters and buffers."""
    flops: int | None
    """Floating-point operations of one batch at the sizes of the view; None where they are not known."""
    same_as: int
    """The first subgraph with the same structure up to names; its own number where there is none before it."""
    measured: MeasuredSubgraph | None = None


@dataclass(frozen=True)
class StepView:
    """One step of the schedule and the most memory that it is predicted to hold at once."""

    text: str
    kind: str
    subgraph: int
    parts: Mapping[str, int]
    """What for -> bytes, as `fxcalib plan` has them: weights, batches, stored, statistics, working, ..."""


@dataclass(frozen=True)
class MemoryView:
    """The steps of a calibration."""

    title: str
    """Of what, where and for how many samples; or why there are no steps."""
    steps: tuple[StepView, ...]


@dataclass(frozen=True)
class RunView:
    """Totals of the run that a report describes."""

    title: str
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    perplexity_before: float | None
    perplexity_after: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class GraphView:
    """A traced and partitioned model."""

    model: str
    type: str
    """Class of the model."""
    targets: tuple[str, ...]
    """The patterns that chose the sequential targets."""
    sizes: Mapping[str, int]
    """The sizes at which bytes and operations are counted."""
    parameters: int
    bytes: int
    subgraphs: tuple[SubgraphView, ...]
    nodes: tuple[NodeView, ...]
    edges: tuple[EdgeView, ...]
    guards: tuple[str, ...]
    memory: MemoryView | None = None
    """None where it was not asked for."""
    run: RunView | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"format": FORMAT, **plain(asdict(self))}

    def to_json(self) -> str:
        """The content of the `.json` file."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class TreeNode:
    """One module of a model that cannot be traced, or a stretch of siblings that look the same."""

    name: str
    """Qualified name; of the first one in a stretch."""
    type: str
    depth: int
    count: int
    """How many siblings of the same structure it stands for."""
    parameters: int
    bytes: int
    target: bool
    failing: bool
    """Whether the trace stopped in this module's own forward."""


@dataclass(frozen=True)
class TreeView:
    """The modules of a model that cannot be traced, and where and why the trace stopped."""

    model: str
    type: str
    error: str
    source: str
    """The model's line at which the trace stopped: `file:line: text`."""
    nodes: tuple[TreeNode, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"format": FORMAT, **plain(asdict(self))}

    def to_json(self) -> str:
        """The content of the `.json` file."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
