"""One run of a pipeline and the report of it."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxcalib import memory
from fxcalib.arguments import DatasetArguments
from fxcalib.batch_checks import fingerprint_batches
from fxcalib.modifiers import Modifier
from fxcalib.modifiers.schemes import unquantizable
from fxcalib.pipelines import CalibrationPipeline
from fxcalib.profiling import Profile, profiling
from fxcalib.progress import Progress
from fxcalib.recipes import Recipe
from fxcalib.report import Report, unquantized_note, versions


def run(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    modifiers: Sequence[Modifier],
    pipeline: str | None,
    arguments: DatasetArguments,
    progress: Progress,
    profiled: bool,
) -> Report:
    """Compress `model` in place by a pipeline; the arguments are those of `calibrate`, checked.

    Raises:
        FxcalibError: see `fxcalib.errors`; the model may then be compressed in part.
    """
    if isinstance(modifiers, Recipe):
        modifiers.refuse_conflicts(model)
    memory.reset_peaks()
    started = time.perf_counter()
    fingerprint = _Fingerprinted(dataloader)
    profile = Profile(arguments.compute_device()) if profiled else None
    with _collected_warnings() as caught, profiling(profile):
        flow = CalibrationPipeline.from_modifiers(modifiers, pipeline)
        outcome = flow(model, fingerprint if dataloader is not None else None, arguments, progress=progress)
    parts = {} if profile is None else profile.seconds()
    seconds = time.perf_counter() - started
    note = unquantized_note(unquantizable(model), sum(p.numel() for p in model.parameters()))
    return Report(
        model=getattr(model, "name_or_path", "") or type(model).__name__,
        pipeline=flow.name,
        algorithm=", ".join(type(m).__name__ for m in modifiers),
        scheme=", ".join(dict.fromkeys(module.scheme for module in outcome.modules)),
        subgraphs=outcome.subgraphs,
        modules=outcome.modules,
        seconds=seconds,
        timings={"calibrate": seconds},
        tokens=outcome.tokens,
        samples=outcome.samples,
        batches=outcome.batches,
        passes=outcome.passes,
        retraces=outcome.retraces,
        peak_host_bytes=memory.peak_host_bytes(),
        peak_device_bytes=memory.peak_device_bytes(),
        seed=arguments.seed,
        data=fingerprint.describe() if outcome.batches else {},
        versions=versions(),
        warnings=tuple(caught),
        notes=() if note is None else (note,),
        profile=parts,
    )


class _Fingerprinted:
    """A dataloader that remembers what identifies the batches that were taken from it."""

    def __init__(self, dataloader: Iterable[Mapping[str, Any]] | None) -> None:
        self._dataloader = dataloader
        self._prints: list[str] = []

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self._prints.clear()
        for batch in self._dataloader or ():
            if isinstance(batch, Mapping):
                self._prints.append(fingerprint_batches([batch]))
            yield batch

    def describe(self) -> dict[str, object]:
        """For the report."""
        return {"source": "given batches", "fingerprint": hashlib.sha256("".join(self._prints).encode()).hexdigest()}


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Texts of the warnings raised inside, which are shown as well."""
    texts: list[str] = []
    show = warnings.showwarning

    def collect(message: Warning | str, *rest: Any, **more: Any) -> None:
        texts.append(str(message))
        show(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = collect
        yield texts
