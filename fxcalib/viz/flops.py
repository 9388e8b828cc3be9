"""Floating-point operations of each subgraph, from one pass of each kind over fake tensors."""

from __future__ import annotations

import torch

from fxcalib.partitioning import Partition
from fxcalib.planning import naive_plan
from fxcalib.prediction.rehearsal import Rehearsal
from fxcalib.programs import Bound, TracedProgram
from fxcalib.tracing.structure import unflatten


def subgraph_flops(partition: Partition) -> dict[int, int]:
    """Subgraph -> operations for one batch of the size that was traced.

    Empty where a module looks at values and so cannot be run on fakes of these sizes.
    """
    program = TracedProgram(partition)
    plan = naive_plan(program.parts(0), [], program.inputs(0))
    bound = _traced_batch(partition)
    try:
        found = Rehearsal(program, plan, [], bound, None, partition.traced.device).run()
    except Exception:  # whatever the model's own code raises when a value that it asks for is not there
        return {}
    return {index: taken.flops for (index, _), taken in found.items()}


def _traced_batch(partition: Partition) -> Bound:
    """The batch of the trace, without its values."""
    recording = partition.traced.recording
    leaves = [_empty(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in recording.inputs.values]
    _, signature = recording.shape_guards.bind(unflatten(recording.inputs.structure, *leaves))
    names = [node.name for node in partition.traced.graph.nodes if node.op == "placeholder"]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return Bound(0, dict(zip(names, tensors, strict=True)), signature)


def _empty(fake: torch.Tensor) -> torch.Tensor:
    sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in fake.shape]
    return torch.empty(sizes, dtype=fake.dtype, device="meta")
