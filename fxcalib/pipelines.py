"""The named pipelines: each says what to run (a traced graph or the whole model) and hands it to one machine.

| name          | program                                    | schedule                                  |
|---------------|--------------------------------------------|-------------------------------------------|
| `sequential`  | the traced graph, cut at sequential targets | calibrate k, commit k, propagate k, each k |
| `layer_sequential` | a chain of layers, or suspended forwards | the same, without a trace             |
| `basic`       | the whole model as one subgraph             | calibrate, commit                         |
| `datafree`    | the whole model as one subgraph             | commit                                    |
| `independent` | that of each modifier's own pipeline        | one modifier after the other              |
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from fxcalib.arguments import DatasetArguments
from fxcalib.batch_checks import check_batch, without_loss_mask
from fxcalib.caches import without_cache
from fxcalib.chains import ChainProgram
from fxcalib.errors import DataError, OptionError, nearest
from fxcalib.executor import Batches, execute
from fxcalib.intermediates import Intermediates
from fxcalib.modifiers.base import Modifier, ModuleResult
from fxcalib.partitioning import partition
from fxcalib.planning import Plan, make_plan
from fxcalib.profiling import span
from fxcalib.programs import Program, TracedProgram, WholeProgram
from fxcalib.progress import Progress
from fxcalib.report import SubgraphReport
from fxcalib.suspended import SuspendedProgram
from fxcalib.tracing import TraceError, default_targets, resolve_targets, trace
from fxcalib.tracing.preserve import unchanged
from fxcalib.weights import all_on

Dataloader = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What one call of a pipeline did."""

    plans: tuple[Plan, ...]
    subgraphs: tuple[SubgraphReport, ...]
    modules: tuple[ModuleResult, ...]
    samples: int
    batches: int
    tokens: int
    """Calibration tokens without padding, each counted once."""
    retraces: int

    @property
    def passes(self) -> int:
        """Passes over all batches that were run."""
        return sum(plan.passes for plan in self.plans)


class CalibrationPipeline(ABC):
    """A way of taking calibration data through a model, made with the modifiers that it applies."""

    name: ClassVar[str]
    uses_data: ClassVar[bool] = True
    _registry: ClassVar[dict[str, type[CalibrationPipeline]]] = {}

    def __init__(self, modifiers: Modifier | Sequence[Modifier], *, inferred: bool = False) -> None:
        self.modifiers = _listed(modifiers)
        self.inferred = inferred
        """Whether nobody asked for this pipeline by name, so that another may take its place."""
        needing = _needing(self.modifiers)
        if not self.uses_data and needing:
            raise OptionError(
                f"the {self.name} pipeline shows no data to the model, but {' and '.join(needing)} "
                "needs it; use pipeline='sequential'"
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:  # a variation without a name of its own does not take its parent's place
            CalibrationPipeline._registry[cls.name] = cls

    @classmethod
    def named(cls, name: str) -> type[CalibrationPipeline]:
        """The pipeline called `name`; case, `-` and `_` are alike.

        Raises:
            OptionError: there is none; the message offers the nearest names.
        """
        if not isinstance(name, str):
            raise OptionError(f"pipeline is {name!r}; give one of {', '.join(sorted(cls._registry))}, or None")
        plain = {key.replace("_", ""): found for key, found in cls._registry.items()}
        wanted = name.lower().replace("-", "").replace("_", "")
        if wanted not in plain:
            raise OptionError(f"unknown pipeline {name!r}: {nearest(name, cls._registry)}")
        return plain[wanted]

    @classmethod
    def from_modifiers(cls, modifiers: Modifier | Sequence[Modifier], user: str | None = None) -> CalibrationPipeline:
        """The pipeline that one modifier or several call for: data-free where none needs data, else sequential.

        A user's choice wins: with a warning where it is worse, with an error where it cannot work.

        Raises:
            OptionError: `user` is unknown, or data-free with modifiers that need data.
        """
        listed = _listed(modifiers)
        needing = _needing(listed)
        inferred = "sequential" if needing else "datafree"
        chosen = cls.named(user or inferred)
        if chosen.name == "basic" and needing:
            warnings.warn(
                f"the basic pipeline calibrates every layer on the outputs of the original model; "
                f"pipeline={inferred!r} calibrates on those of the compressed one and gives a better result",
                stacklevel=2,
            )
        return chosen(listed, inferred=not user)

    def _targets(self, model: nn.Module, arguments: DatasetArguments) -> tuple[list[str], list[str]]:
        targets, ignore = get_targets_from_modifiers(self.modifiers, model)
        if arguments.sequential_targets is not None:
            targets = list(arguments.sequential_targets)
        return targets, [*ignore, *arguments.tracing_ignore]

    @abstractmethod
    def program(self, model: nn.Module, batch: Mapping[str, Any], arguments: DatasetArguments) -> Program:
        """What is run, given the first batch."""

    def __call__(
        self,
        model: nn.Module,
        dataloader: Dataloader | None,
        dataset_args: DatasetArguments | None = None,
        *,
        progress: Progress | None = None,
    ) -> Outcome:
        """Compress `model` in place.

        Args:
            model: moved back to where it was when done.
            dataloader: batches as dicts of tensors for `model(**batch)`; None where no modifier needs data.
            dataset_args: None for the defaults.
            progress: is told of every step.

        Raises:
            FxcalibError: see `fxcalib.errors`; the message names the culprit and the next step.
        """
        arguments = dataset_args or DatasetArguments()
        progress = progress or Progress()
        device = arguments.compute_device()
        torch.manual_seed(arguments.seed)
        with _calibrating(model), _attached(self.modifiers, model):
            surveys = [modifier.survey for modifier in self.modifiers if modifier.survey is not None]
            if not surveys:
                return self._run(model, dataloader, arguments, device, progress)
            kept = None if dataloader is None else list(dataloader)
            with _attached(surveys, model):
                seen = type(self)(surveys, inferred=self.inferred)._run(model, kept, arguments, device, progress)
            done = self._run(model, kept, arguments, device, progress)
            return replace(done, plans=(*seen.plans, *done.plans))

    def _run(
        self,
        model: nn.Module,
        dataloader: Dataloader | None,
        arguments: DatasetArguments,
        device: torch.device,
        progress: Progress,
    ) -> Outcome:
        offload = arguments.sequential_offload_device
        prepare = partial(_prepared, model)
        given: Iterable[object] = ()
        if any(modifier.needs_data for modifier in self.modifiers):
            first, rest = _first_of(dataloader)
            given, checked = chain([first], rest), prepare(first, 0)
            progress.phase("trace")
            with span("trace"):
                for modifier in self.modifiers:
                    modifier.prepare(model, checked, device)
                program = self.program(model, checked, arguments)
        else:
            program = WholeProgram(model)
        needs = [modifier.needs for modifier in self.modifiers]
        store = Intermediates.for_offload(offload, device)
        both = arguments.propagate_error and any(need.originals for need in needs)
        originals = Intermediates.for_offload(offload, device) if both else None
        taken = Batches(program, store, originals)
        with span("data"):
            taken.add(given, prepare)
        plans = {
            variant: make_plan(
                program.parts(variant),
                needs,
                program.inputs(variant),
                resident=all_on(model, device),
                propagate_error=arguments.propagate_error,
            )
            for variant in sorted(taken.variants | {0})
        }
        carried = taken.bytes_of(next((step.writes for step in plans[0].steps if step.writes), ()))
        for each in (store, originals):
            if each is not None:
                each.expect(carried)
        progress.phase("calibrate")
        done = execute(plans, program, taken, self.modifiers, device=device, progress=progress)
        return Outcome(
            plans=(plans[0],),
            subgraphs=done.subgraphs,
            modules=done.modules,
            samples=sum(fact.samples for fact in taken.facts),
            batches=len(taken),
            tokens=sum(fact.tokens for fact in taken.facts),
            retraces=program.retraces,
        )


class SequentialPipeline(CalibrationPipeline):
    """Each batch passes each subgraph twice: to calibrate it, and to propagate what the compressed one puts out.

    A model that cannot be traced is calibrated on its suspended forwards where this pipeline was inferred; where it was
    asked for, the error is raised.
    """

    name = "sequential"

    def program(self, model: nn.Module, batch: Mapping[str, Any], arguments: DatasetArguments) -> Program:
        targets, ignore = self._targets(model, arguments)
        try:
            traced = trace(model, batch, targets, ignore=ignore, device=arguments.compute_device())
        except TraceError as error:
            with torch.no_grad(), unchanged(model):
                model(**copy.deepcopy(dict(batch)))  # an error of the model itself is clearer than one of its trace
            if not self.inferred:
                raise
            warnings.warn(
                "the model cannot be traced, so its own forwards are suspended at each layer instead (the "
                "layer_sequential pipeline with suspended=True; values between layers stay on the device). "
                f"`fxcalib trace` looks into it. The reason: {error}",
                stacklevel=2,
            )
            return SuspendedProgram(model, resolve_targets(model, targets, ignore), batch)
        return TracedProgram(partition(traced, arguments.sequential_targets_per_subgraph))


class LayerSequentialPipeline(CalibrationPipeline):
    """Layer after layer without a trace, for models in which each layer's output is the next one's input.

    With `suspended`, for every model that runs: its own forwards wait at each layer until all batches have come there.
    """

    name = "layer_sequential"

    def program(self, model: nn.Module, batch: Mapping[str, Any], arguments: DatasetArguments) -> Program:
        targets = resolve_targets(model, *self._targets(model, arguments))
        return SuspendedProgram(model, targets, batch) if arguments.suspended else ChainProgram(model, targets)


class BasicPipeline(CalibrationPipeline):
    """Whole forwards of the model: works wherever the model runs, and propagates no error of compression."""

    name = "basic"

    def program(self, model: nn.Module, batch: Mapping[str, Any], arguments: DatasetArguments) -> Program:
        return WholeProgram(model)


class DataFreePipeline(BasicPipeline):
    """Weights alone; no data is needed."""

    name = "datafree"
    uses_data = False


class IndependentPipeline(CalibrationPipeline):
    """Each modifier has its own epoch and its own inferred pipeline, in order."""

    name = "independent"

    def program(self, model: nn.Module, batch: Mapping[str, Any], arguments: DatasetArguments) -> Program:
        raise NotImplementedError("each modifier's own pipeline says what is run")

    def __call__(
        self,
        model: nn.Module,
        dataloader: Dataloader | None,
        dataset_args: DatasetArguments | None = None,
        *,
        progress: Progress | None = None,
    ) -> Outcome:
        batches = None if dataloader is None else list(dataloader)
        outcomes = [
            CalibrationPipeline.from_modifiers([m])(model, batches, dataset_args, progress=progress)
            for m in self.modifiers
        ]
        most = max(outcomes, key=lambda outcome: outcome.batches)
        return Outcome(
            plans=tuple(plan for o in outcomes for plan in o.plans),
            subgraphs=tuple(subgraph for o in outcomes for subgraph in o.subgraphs),
            modules=tuple(module for o in outcomes for module in o.modules),
            samples=most.samples,
            batches=most.batches,
            tokens=most.tokens,
            retraces=sum(o.retraces for o in outcomes),
        )


def _listed(modifiers: Modifier | Sequence[Modifier]) -> tuple[Modifier, ...]:
    listed = (modifiers,) if isinstance(modifiers, Modifier) else tuple(modifiers)
    if not listed:
        raise OptionError("a pipeline needs at least one modifier")
    return listed


def _needing(modifiers: Sequence[Modifier]) -> list[str]:
    return [type(modifier).__name__ for modifier in modifiers if modifier.needs_data]


def get_targets_from_modifiers(modifiers: Sequence[Modifier], model: nn.Module) -> tuple[list[str], list[str]]:
    """Sequential targets, and modules to keep whole in the trace, that `modifiers` ask for.

    What several modifiers ask for is merged; where none asks, the targets are the model's no-split modules, else the
    class of its largest repeated layer stack.

    Raises:
        TargetError: a target matches nothing.
        OptionError: one modifier's targets lie inside of another's, so that no one order of steps suits both.
    """
    asking = [(m, tuple(m.sequential_targets)) for m in modifiers if m.sequential_targets is not None]
    targets = list(dict.fromkeys(target for _, wanted in asking for target in wanted))
    ignore = list(dict.fromkeys(pattern for m in modifiers for pattern in m.tracing_ignore))
    if not targets:
        return default_targets(model), ignore
    merged = set(resolve_targets(model, targets).names)
    for modifier, wanted in asking:
        lost = sorted(set(resolve_targets(model, wanted).names) - merged)
        if lost:
            raise OptionError(
                f"{type(modifier).__name__} asks for sequential targets {', '.join(wanted)}, but {lost[0]} lies inside "
                "of a target that another modifier asks for; give both the same sequential_targets, or use "
                "pipeline='independent'"
            )
    return targets, ignore


def _first_of(dataloader: Dataloader | None) -> tuple[Mapping[str, Any], Iterator[Mapping[str, Any]]]:
    if dataloader is None:
        raise DataError("these modifiers need calibration data; pass a dataloader of dicts of tensors")
    rest = iter(dataloader)
    try:
        return next(rest), rest
    except StopIteration:
        raise DataError("the dataloader yields no batch; pass at least one") from None


def _prepared(model: nn.Module, batch: object, index: int) -> Mapping[str, Any]:
    """`batch` as `model` is called with it. It is checked as the caller made it, so that messages name no other key."""
    check_batch(model, batch, index)
    assert isinstance(batch, Mapping)
    return without_cache(model, without_loss_mask(batch))


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attached(modifiers: Sequence[Modifier], model: nn.Module) -> Iterator[None]:
    attached: list[Modifier] = []
    try:
        for modifier in modifiers:
            attached.append(modifier)
            modifier.attach(model)
        yield
    finally:
        for modifier in reversed(attached):
            modifier.detach(model)
