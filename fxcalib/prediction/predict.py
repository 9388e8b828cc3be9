"""Plans a calibration of a model whose weights are not there, and predicts what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxcalib.arguments import DatasetArguments
from fxcalib.batch_checks import check_batch
from fxcalib.caches import without_cache
from fxcalib.intermediates import AUTO, Room, storage_device
from fxcalib.partitioning.subgraph import Value
from fxcalib.partitioning.subgraph import describe as describe_value
from fxcalib.pipelines import CalibrationPipeline, _attached, _calibrating
from fxcalib.planning import Part, make_plan
from fxcalib.prediction import machine
from fxcalib.prediction.dry_run import CarriedValue, DryRun, SubgraphPlan
from fxcalib.prediction.ledger import Facts, Moved, moments, moved
from fxcalib.prediction.rehearsal import Rehearsal, Rehearsed
from fxcalib.prediction.saving import saved, unique_bytes
from fxcalib.prediction.solving import Committed, commit_of
from fxcalib.programs import Bound, Program, TracedProgram, WholeProgram


@dataclass(frozen=True)
class Calibration:
    """The data of a calibration, without the data."""

    samples: int
    batch_size: int
    seq_len: int
    padded: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each batch; the last may be smaller."""
        full, rest = divmod(self.samples, self.batch_size)
        return (self.batch_size,) * full + (rest,) * bool(rest)

    def batch(self) -> dict[str, Any]:
        """The first batch: token 0 everywhere; where samples are padded, one position of the first is."""
        ids = torch.zeros(self.sizes[0], self.seq_len, dtype=torch.int64)
        mask = torch.ones_like(ids)
        if self.padded:
            mask[0, -1] = 0
        return {"input_ids": ids, "attention_mask": mask}


def predict(
    model: nn.Module,
    name: str,
    flow: CalibrationPipeline,
    calibration: Calibration,
    arguments: DatasetArguments,
    *,
    writes: bool = True,
    batch: Mapping[str, Any] | None = None,
) -> DryRun:
    """What `flow` would do with `model`, which is left as it was; it may lie on the meta device.

    Args:
        model: the skeleton.
        name: what to call it.
        flow: a pipeline with its modifiers, not the independent one.
        calibration: how much data.
        arguments: as the pipeline takes them.
        writes: whether a checkpoint is written.
        batch: the first batch where it is not one of token ids.

    Raises:
        FxcalibError: whatever the calibration itself would refuse about model, options and sizes.
    """
    device = arguments.compute_device()
    offload = storage_device(arguments.sequential_offload_device, device)
    auto = arguments.sequential_offload_device == AUTO and device.type == "cuda"
    with _calibrating(model), _attached(flow.modifiers, model):
        return _Prediction(model, name, flow, calibration, arguments, device, offload, auto, batch).dry_run(writes)


class _Prediction:
    def __init__(
        self,
        model: nn.Module,
        name: str,
        flow: CalibrationPipeline,
        calibration: Calibration,
        arguments: DatasetArguments,
        device: torch.device,
        offload: torch.device,
        auto: bool,
        batch: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._name, self._flow, self._calibration = model, name, flow, calibration
        self._device, self._offload, self._auto = device, offload, auto
        given = without_cache(model, calibration.batch() if batch is None else batch)
        self._observes = any(modifier.needs_data for modifier in flow.modifiers)
        if self._observes:
            for modifier in flow.modifiers:
                modifier.prepare(model, given, device)
        self._needs = [modifier.needs for modifier in flow.modifiers]
        mask = given.get("attention_mask")
        self._mask = mask.bool() if calibration.padded and isinstance(mask, torch.Tensor) else None
        if self._observes:
            check_batch(model, given, 0)
            self._program: Program = flow.program(model, given, arguments)
            self._bound = self._program.bind(given)
        else:
            self._program, self._bound = WholeProgram(model), Bound(0, {}, ())
        resident = device.type == "cpu"
        parts = self._program.parts(self._bound.variant)
        inputs = self._program.inputs(self._bound.variant)
        self._plan = make_plan(parts, self._needs, inputs, resident=resident, propagate_error=arguments.propagate_error)

    def dry_run(self, writes: bool) -> DryRun:
        rehearsal = Rehearsal(self._program, self._plan, self._flow.modifiers, self._bound, self._mask, self._device)
        rehearsed = rehearsal.run()
        alike = rehearsal.alike()
        committed = self._committed(rehearsal, rehearsed, alike)
        values = self._values()
        parts = self._program.parts(self._bound.variant)
        facts = Facts(
            weights=unique_bytes(self._model),
            called=[unique_bytes(*self._program.called(k)) for k in range(len(parts))],
            values={name: (value.batch_bytes, value.total_bytes) for name, value in values.items()},
            rehearsed=rehearsed,
            committed=committed,
            saved=saved(self._model) if writes else None,
            on_device=self._device.type != "cpu",
            workspace=_workspace(self._device),
            stored_on_device=self._device.type != "cpu" and self._offload == self._device,
        )
        if self._auto:
            facts = replace(facts, stored_on_device=self._fits(facts, parts))
        flops = self._flops(rehearsed, committed)
        crossed = moved(self._plan, facts)
        subgraphs = self._subgraphs(facts, values, alike, flops)
        parameters = {id(p): p.numel() for p in self._model.parameters()}
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        dtype_name = str(dtype).removeprefix("torch.")
        return DryRun(
            model=self._name,
            pipeline=self._flow.name,
            algorithm=", ".join(type(m).__name__ for m in self._flow.modifiers),
            device=str(self._device),
            dtype=dtype_name,
            parameters=sum(parameters.values()) - self._quantization_parameters(),
            weight_bytes=facts.weights,
            samples=self._calibration.samples,
            batch_size=self._calibration.batch_size,
            batches=len(self._calibration.sizes),
            seq_len=self._calibration.seq_len,
            padded=self._calibration.padded,
            inputs=tuple(values[name] for name in self._plan.inputs),
            subgraphs=subgraphs,
            plan=self._plan,
            moments=moments(self._plan, parts, facts),
            moved=crossed,
            disk_bytes=0 if facts.saved is None else facts.saved.disk_bytes,
            saved_by_recomputing=sum({v.name: v.total_bytes for s in subgraphs for v in s.recomputes}.values()),
            flops=sum(flops.values()),
            seconds=self._seconds(rehearsed, committed, crossed, dtype_name),
        )

    def _fits(self, facts: Facts, parts: Sequence[Part]) -> bool:
        """Whether all intermediates may stay on the device."""
        away = moments(self._plan, parts, facts)
        stored = max(moment.host.get("stored", 0) for moment in away)
        return stored <= Room(self._device).beside(max(moment.device_bytes for moment in away))

    def _quantization_parameters(self) -> int:
        names = {n for need in self._needs for n in need.committed}
        modules = [self._model.get_submodule(name) for name in names]
        own = {id(m): m for m in modules}.values()
        known = ("weight", "bias")
        return sum(p.numel() for m in own for n, p in m.named_parameters(recurse=False) if n not in known)

    def _committed(
        self, rehearsal: Rehearsal, rehearsed: Mapping[tuple[int, str], Rehearsed], alike: Sequence[int]
    ) -> dict[int, Committed]:
        found: dict[int, Committed] = {}
        known: dict[tuple[int, tuple[int, ...]], Committed] = {}
        on_cuda = self._device.type == "cuda"
        for index, step in enumerate(self._plan.steps):
            if step.kind != "commit":
                continue
            first = alike[step.subgraph]
            if (first, step.modifiers) not in known:
                modules = rehearsal.modules(first)
                shared = rehearsed.get((first, "calibrate"), Rehearsed()).shared
                each = [
                    commit_of(self._flow.modifiers[i], modules, self._needs[i].committed, shared, on_cuda=on_cuda)
                    for i in step.modifiers
                ]
                known[first, step.modifiers] = Committed(
                    max(c.working_bytes for c in each), sum(c.flops for c in each), sum(c.traffic for c in each)
                )
            found[index] = known[first, step.modifiers]
        return found

    @property
    def _share(self) -> float:
        """All samples as a multiple of the first batch."""
        return self._calibration.samples / self._calibration.sizes[0]

    def _flops(
        self, rehearsed: Mapping[tuple[int, str], Rehearsed], committed: Mapping[int, Committed]
    ) -> dict[int, int]:
        """Subgraph -> floating-point operations of all its steps."""
        found = dict.fromkeys(range(self._plan.subgraphs), 0)
        for index, step in enumerate(self._plan.steps):
            if step.sweeps:
                found[step.subgraph] += int(rehearsed[step.subgraph, step.kind].flops * self._share)
            elif step.kind == "commit":
                found[step.subgraph] += committed[index].flops
        return found

    def _seconds(
        self,
        rehearsed: Mapping[tuple[int, str], Rehearsed],
        committed: Mapping[int, Committed],
        crossed: Moved,
        dtype: str,
    ) -> float | None:
        rates = machine.read(self._device)
        if rates is None:
            return None
        total = 0.0
        for index, step in enumerate(self._plan.steps):
            if step.sweeps:
                one = rehearsed[step.subgraph, step.kind]
                total += self._share * rates.seconds(one.flops, one.float32_flops, one.traffic, dtype)
            elif step.kind == "commit":
                solved = committed[index]
                total += rates.seconds(solved.flops, solved.flops, solved.traffic, dtype)
        if rates.to_device and rates.to_host:
            total += crossed.host_to_device / rates.to_device + crossed.device_to_host / rates.to_host
        return total

    def _values(self) -> dict[str, CarriedValue]:
        """Every value that is read across subgraphs, and what the batches hold."""
        if not isinstance(self._program, TracedProgram):
            return {n: self._whole(n) for n in self._program.inputs(self._bound.variant)}
        partition = self._program.partition
        last = {name: s.subgraph for s in self._plan.steps for name in s.frees}
        nodes = {node.name: node for node in partition.traced.graph.nodes}
        found = {
            name: self._carried(value, True, last.get(name))
            for subgraph in partition
            for name, value in subgraph.values.items()
        }
        for name in self._plan.inputs:
            if name not in found:
                found[name] = self._carried(describe_value(partition.traced, nodes[name]), True, last.get(name))
        return found

    def _whole(self, name: str) -> CarriedValue:
        value = self._bound.values[name]
        if not isinstance(value, torch.Tensor):
            return CarriedValue(name, None, None, 0, 0, True, 0)
        shape = tuple(map(str, value.shape))
        total = int(value.nbytes * self._share)
        return CarriedValue(name, shape, str(value.dtype).removeprefix("torch."), value.nbytes, total, True, 0)

    def _carried(self, value: Value, stored: bool, freed_after: int | None) -> CarriedValue:
        assert isinstance(self._program, TracedProgram)
        sizes = self._program.sizes(self._bound)
        counts = self._calibration.sizes

        def at(batch: int) -> int:
            known = {**sizes, **({"batch": batch} if batch != counts[0] else {})}
            return int(value.bytes.subs({s: known.get(s.name, 1) for s in value.bytes.free_symbols}))

        total = at(counts[0]) * (len(counts) - 1) + at(counts[-1])
        shape = None if value.shape is None else tuple(str(sympy.sympify(s)) for s in value.shape)
        dtype = None if value.dtype is None else str(value.dtype).removeprefix("torch.")
        return CarriedValue(value.name, shape, dtype, at(counts[0]), total, stored, freed_after)

    def _recomputed(self) -> list[tuple[CarriedValue, ...]]:
        """For each subgraph what modules read that it computes although an earlier subgraph did."""
        if not isinstance(self._program, TracedProgram):
            return [()]
        computed: set[fx.Node] = set()
        found = []
        for subgraph in self._program.partition:
            read = {i for n in subgraph.nodes if n.op == "call_module" for i in n.all_input_nodes}
            again = [n for n in subgraph.nodes if n in computed and n in read and n.op == "call_function"]
            values = (describe_value(subgraph.traced, node) for node in again)
            found.append(tuple(self._carried(v, False, None) for v in values if v.bytes != 0))
            computed.update(n for n in subgraph.nodes if n.op == "call_function")
        return found

    def _subgraphs(
        self, facts: Facts, values: Mapping[str, CarriedValue], alike: Sequence[int], flops: Mapping[int, int]
    ) -> tuple[SubgraphPlan, ...]:
        recomputed = self._recomputed()
        found = []
        for part in self._program.parts(self._bound.variant):
            k = part.index
            steps = [(i, s) for i, s in enumerate(self._plan.steps) if s.subgraph == k]
            own = {(i, k) for i, _ in steps}
            passes = [facts.rehearsed[k, s.kind] for _, s in steps if s.sweeps]
            written = dict.fromkeys(name for _, s in steps for name in s.writes)
            found.append(
                SubgraphPlan(
                    index=k,
                    like=alike[k],
                    modules=self._called(k),
                    observed=sum(s.modules for _, s in steps if s.kind == "calibrate"),
                    compressed=sum(s.modules for _, s in steps if s.kind == "commit"),
                    weight_bytes=facts.called[k],
                    reads=tuple(dict.fromkeys(name for _, s in steps for name in s.reads)),
                    carries=tuple(values[name] for name in written),
                    recomputes=recomputed[k],
                    frees=tuple(name for _, s in steps for name in s.frees),
                    working_bytes=max((r.working_bytes for r in passes), default=0),
                    statistics_bytes=max((r.statistics_bytes for r in passes), default=0),
                    commit_bytes=max((c.working_bytes for i, c in facts.committed.items() if (i, k) in own), default=0),
                    flops=flops[k],
                )
            )
        return tuple(found)

    def _called(self, subgraph: int) -> tuple[str, ...]:
        if isinstance(self._program, TracedProgram):
            return self._program.partition[subgraph].module_names
        return (type(self._model).__name__,)


def _workspace(device: torch.device) -> int:
    """Bytes that torch gives cuBLAS with the first matrix product: its defaults for Hopper and later, and before."""
    if device.type != "cuda":
        return 0
    return 32 << 20 if torch.cuda.get_device_capability(device)[0] >= 9 else 8320 << 10


__all__ = ["Calibration", "predict"]
