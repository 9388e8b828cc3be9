"""The two calls most users need: `calibrate` compresses a model in place, `quantize` also loads, evaluates, saves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fxcalib import memory
from fxcalib.arguments import DatasetArguments
from fxcalib.batch_checks import fingerprint_batches
from fxcalib.batch_size import samples_a_batch
from fxcalib.checkpoint import prepare_output, save
from fxcalib.data import batches, build, load_texts
from fxcalib.errors import DataError, ModelError, OptionError, nearest
from fxcalib.evaluation import evaluate as evaluate_model
from fxcalib.loading import (
    DTYPES,
    LoadedModel,
    load,
    load_skeleton,
    refuse_meta,
    refuse_non_finite,
    refuse_quantized,
)
from fxcalib.modifiers import GPTQModifier, Modifier, QuantizationModifier
from fxcalib.modifiers.schemes import unquantizable
from fxcalib.patterns import names_of
from fxcalib.pipelines import CalibrationPipeline
from fxcalib.profiling import Profile, profiling
from fxcalib.progress import Progress
from fxcalib.report import Report, unquantized_note, versions
from fxcalib.sources import check_source

if TYPE_CHECKING:
    from fxcalib.prediction import DryRun

ALGORITHMS: dict[str, type[GPTQModifier] | type[QuantizationModifier]] = {
    "gptq": GPTQModifier,
    "rtn": QuantizationModifier,
}


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    modifiers: Modifier | Sequence[Modifier],
    *,
    pipeline: str | None = "sequential",
    targets: str | Sequence[str] | None = None,
    targets_per_subgraph: int = 1,
    propagate_error: bool = True,
    suspended: bool = False,
    offload: str = "auto",
    device: str | None = None,
    seed: int = 0,
    profile: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress `model` in place.

    Args:
        model: any module; a causal language model of transformers, say.
        dataloader: batches as dicts of tensors for `model(**batch)`, such as `input_ids` (batch, sequence) int64 and
            `attention_mask`; None where no modifier needs data.
        modifiers: what to do, in order.
        pipeline: `sequential`, `layer_sequential`, `basic`, `datafree` or `independent`; None infers it from the
            modifiers, and suspends the forwards of a model that cannot be traced.
        targets: sequential targets as class names, module names or `re:` patterns; default: the decoder layers.
        targets_per_subgraph: how many targets are calibrated at once.
        propagate_error: calibrate each subgraph on what the compressed ones before it put out; else one pass over the
            data on the original model's values does for both.
        suspended: in the layer_sequential pipeline, suspend the model's own forwards at each layer instead of calling
            the layers in a chain.
        offload: where intermediates lie between batches: `cpu`, `none` (on the device that computes), a device, or
            `auto`: on the device that computes as far as they fit, else on the CPU.
        device: where to compute; default: the accelerator if there is one. The model returns to where it was.
        seed: of random operations in the model.
        profile: report where the time went.
        progress: is told of every step.

    Returns:
        What was done, with the error of every module.

    Raises:
        FxcalibError: see `fxcalib.errors`; the model may then be compressed in part.
    """
    arguments = DatasetArguments(
        sequential_targets=_targets(targets),
        sequential_targets_per_subgraph=targets_per_subgraph,
        propagate_error=propagate_error,
        suspended=suspended,
        sequential_offload_device=offload,
        device=device,
        seed=seed,
    )
    chosen = _listed(modifiers)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {model!r}; calibrate takes an nn.Module, quantize also folders and hub ids")
    refuse_meta(model)
    refuse_non_finite(model)
    progress = progress or Progress()
    try:
        return _calibrate(model, dataloader, chosen, pipeline, arguments, progress, profile)
    finally:
        progress.close()


def quantize(
    model: str | Path | nn.Module | None = None,
    *,
    algorithm: str = "gptq",
    scheme: str = "W4A16",
    group_size: int | None = None,
    ignore: Sequence[str] | None = None,
    modifiers: Modifier | Sequence[Modifier] | None = None,
    data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    text_column: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    pipeline: str | None = None,
    targets: str | Sequence[str] | None = None,
    targets_per_subgraph: int = 1,
    propagate_error: bool = True,
    suspended: bool = False,
    offload: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    processor: Any = None,
    evaluate: bool = False,
    profile: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Load a model, calibrate it on text, and save it as a compressed-tensors checkpoint.

    Args:
        model: a local folder, a hub id, or a module, which is compressed in place; None: the small model that the
            package ships.
        algorithm: `gptq` or `rtn` (round to nearest).
        scheme: a preset of compressed-tensors, such as `W4A16`, `W8A8`, `FP8_DYNAMIC`.
        group_size: columns that share a scale, for schemes that quantize weights in groups; default: the scheme's.
        ignore: modules to leave as they are; default: the output head.
        modifiers: used instead of `algorithm`, `scheme`, `group_size` and `ignore` where given.
        data: a text, jsonl, json, csv or parquet file, a folder of those, a `datasets` id, or batches as dicts of
            tensors; default: text that the package ships.
        text_column: of the data; default: `text`.
        samples, seq_len: how much text, in samples and tokens a sample; default: up to 128 of up to 1024.
        batch_size: samples a batch; default: as many as keep the device busy, within its memory.
        pack: join documents to samples without padding; else one document is one sample, padded.
        pipeline: as `calibrate`; default: inferred from the modifiers.
        targets, targets_per_subgraph, propagate_error, suspended, offload, device, seed: as `calibrate`.
        dtype: to load the model in; `auto` is the checkpoint's own.
        output: folder to save to; None saves nothing.
        overwrite: replace a checkpoint that fxcalib wrote there before.
        processor: tokenizer or processor of a module; loaded ones bring their own.
        evaluate: measure the perplexity on held-out text before and after.
        profile: report where the time of the calibration went.
        trust_remote_code: run code that comes with the checkpoint.
        progress: is told of every step.

    Returns:
        What was done, as saved in `fxcalib_report.json`.

    Raises:
        FxcalibError: see `fxcalib.errors`; no output folder is left behind.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    clock = _Clock()
    arguments = DatasetArguments(
        dataset=data if isinstance(data, (str, Path)) else None,
        text_column=text_column,
        num_calibration_samples=samples,
        max_seq_length=seq_len,
        batch_size=batch_size,
        concatenate_data=pack,
        sequential_targets=_targets(targets),
        sequential_targets_per_subgraph=targets_per_subgraph,
        propagate_error=propagate_error,
        suspended=suspended,
        sequential_offload_device=offload,
        device=device,
        seed=seed,
    )
    try:
        chosen = _modifiers(algorithm, scheme, group_size, ignore, modifiers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of comes with the run, and into its report
            CalibrationPipeline.from_modifiers(chosen, pipeline)  # options are refused before a model is loaded
        _refuse_kind(model)
        if any(modifier.needs_data for modifier in chosen):
            _refuse_data(data)
        source = Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
        if output is not None:
            prepare_output(output, overwrite=overwrite, source=source)
        progress.phase("load")
        with clock("load"):
            loaded = _load(model, processor, dtype, trust_remote_code)
        with clock("data"):
            given = None if isinstance(data, (str, Path)) else data
            dataloader, described = _data(loaded, chosen, given, arguments)
        before = _perplexity(loaded, evaluate, arguments, progress, clock, "evaluate before")
        report = _calibrate(loaded.model, dataloader, chosen, pipeline, arguments, progress, profile)
        clock.seconds["calibrate"] = report.seconds
        after = _perplexity(loaded, evaluate, arguments, progress, clock, "evaluate after")
        report = replace(
            report,
            model=loaded.name,
            algorithm=report.algorithm if modifiers is not None else algorithm.lower(),
            scheme=_scheme_label(scheme, group_size)
            if modifiers is None and isinstance(scheme, str)
            else report.scheme,
            data={**report.data, **described},
            perplexity_before=before,
            perplexity_after=after,
            output=None if output is None else str(Path(output).expanduser().absolute()),
            seconds=time.perf_counter() - started,
            timings=dict(clock.seconds),
        )
        if output is not None:
            progress.phase("save")
            saved_from = loaded.source if isinstance(model, (str, Path)) or model is None else None
            with clock("save"):
                save(
                    loaded.model,
                    output,
                    processor=loaded.processor,
                    source=saved_from,
                    report=report,
                    overwrite=overwrite,
                )
        return replace(report, seconds=time.perf_counter() - started, timings=dict(clock.seconds))
    finally:
        progress.close()


def plan(
    model: str | Path | nn.Module | None = None,
    *,
    algorithm: str = "gptq",
    scheme: str = "W4A16",
    group_size: int | None = None,
    ignore: Sequence[str] | None = None,
    modifiers: Modifier | Sequence[Modifier] | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    pipeline: str | None = None,
    targets: str | Sequence[str] | None = None,
    targets_per_subgraph: int = 1,
    propagate_error: bool = True,
    suspended: bool = False,
    offload: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    writes: bool = True,
    calibrate_machine: bool = False,
    trust_remote_code: bool = False,
) -> DryRun:
    """What `quantize` would do with the same options: subgraphs, steps, bytes, operations. No weight is loaded.

    Args:
        model, ..., overwrite, trust_remote_code: as `quantize` has them; a module may lie on the meta device. The data
            is not read: all `samples` (by default 128) are taken to be there, of `seq_len` tokens each.
        writes: whether a checkpoint is written at the end.
        calibrate_machine: measure how fast this machine multiplies and copies first, and keep that for later plans.

    Raises:
        FxcalibError: what `quantize` would refuse of model and options.
    """
    from fxcalib.embedded import MODEL_DIR
    from fxcalib.prediction import Calibration, machine, predict

    chosen = _modifiers(algorithm, scheme, group_size, ignore, modifiers)
    flow = CalibrationPipeline.from_modifiers(chosen, pipeline)
    _refuse_kind(model)
    if flow.name == "independent":
        if len(chosen) > 1:
            raise OptionError("the independent pipeline runs one modifier after another; plan each of them by itself")
        flow = CalibrationPipeline.from_modifiers(chosen)
    note = ""
    if flow.name == "layer_sequential":
        flow = CalibrationPipeline.from_modifiers(chosen, "sequential")
        note = "layer_sequential traces nothing and needs weights: this is the plan of sequential, with the same steps"
    for name, value in (("samples", samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: {nearest(str(dtype), ['auto', *DTYPES])}")
    if isinstance(model, nn.Module):
        refuse_quantized(model)
        skeleton, label = model, getattr(model, "name_or_path", "") or type(model).__name__
    else:
        folder = MODEL_DIR if model is None else model
        skeleton, label = load_skeleton(folder, trust_remote_code=trust_remote_code), Path(folder).name
        skeleton = skeleton if dtype == "auto" else skeleton.to(DTYPES[dtype])
    if output is not None:
        source = Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
        prepare_output(output, overwrite=overwrite, source=source)
    arguments = DatasetArguments(
        num_calibration_samples=samples,
        max_seq_length=seq_len,
        batch_size=batch_size,
        concatenate_data=pack,
        sequential_targets=_targets(targets),
        sequential_targets_per_subgraph=targets_per_subgraph,
        propagate_error=propagate_error,
        suspended=suspended,
        sequential_offload_device=offload,
        device=device,
        seed=seed,
    )
    if calibrate_machine:
        machine.measure(arguments.compute_device())
    length = arguments.seq_len(getattr(skeleton, "config", None))
    calibration = Calibration(
        samples=arguments.samples,
        batch_size=samples_a_batch(skeleton, length, arguments.compute_device()) if batch_size is None else batch_size,
        seq_len=length,
        padded=not pack,
    )
    return replace(predict(skeleton, label, flow, calibration, arguments, writes=writes), note=note)


def _calibrate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    modifiers: Sequence[Modifier],
    pipeline: str | None,
    arguments: DatasetArguments,
    progress: Progress,
    profiled: bool,
) -> Report:
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


def _listed(modifiers: Modifier | Sequence[Modifier]) -> list[Modifier]:
    several = isinstance(modifiers, Iterable) and not isinstance(modifiers, str)
    listed: list[Any] = list(cast(Iterable[object], modifiers)) if several else [modifiers]
    for each in listed:
        if not isinstance(each, Modifier):
            raise OptionError(
                f"modifiers holds {each!r}, a {type(each).__name__}; "
                "give modifiers, such as GPTQModifier(scheme='W4A16')"
            )
    return listed


def _targets(targets: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return None if targets is None else tuple(names_of(targets, "sequential target"))


def _refuse_kind(model: object) -> None:
    if model is not None and not isinstance(model, (str, Path, nn.Module)):
        raise ModelError(f"model is {model!r}, a {type(model).__name__}; give a folder, a hub id or an nn.Module")


def _refuse_data(data: object) -> None:
    if isinstance(data, (str, Path)):
        check_source(data)
    elif data is not None and not isinstance(data, Iterable):
        raise DataError(
            f"data is {data!r}, a {type(data).__name__}; give a file, a dataset's id, or batches of tensors"
        )


def _modifiers(
    algorithm: str,
    scheme: str,
    group_size: int | None,
    ignore: Sequence[str] | None,
    given: Modifier | Sequence[Modifier] | None,
) -> list[Modifier]:
    if given is not None:
        return _listed(given)
    if not isinstance(algorithm, str):
        raise OptionError(f"algorithm is {algorithm!r}; give one of {', '.join(ALGORITHMS)}")
    if algorithm.lower() not in ALGORITHMS:
        raise OptionError(f"unknown algorithm {algorithm!r}: {nearest(algorithm, ALGORITHMS)}")
    return [ALGORITHMS[algorithm.lower()](scheme=scheme, group_size=group_size, ignore=ignore)]


def _scheme_label(scheme: str, group_size: int | None) -> str:
    return scheme.upper() if group_size is None else f"{scheme.upper()} group {group_size}"


def _load(model: str | Path | nn.Module | None, processor: Any, dtype: str, trust_remote_code: bool) -> LoadedModel:
    if isinstance(model, nn.Module):
        refuse_quantized(model)
        refuse_meta(model)
        refuse_non_finite(model)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return LoadedModel(model=model, processor=processor, source=Path(), name=name)
    from fxcalib.embedded import MODEL_DIR

    return load(MODEL_DIR if model is None else model, dtype=dtype, trust_remote_code=trust_remote_code)


def _data(
    loaded: LoadedModel,
    modifiers: Sequence[Modifier],
    given: Iterable[Mapping[str, Any]] | None,
    arguments: DatasetArguments,
) -> tuple[Iterable[Mapping[str, Any]] | None, dict[str, object]]:
    if not any(modifier.needs_data for modifier in modifiers):
        return None, {}
    if given is not None:
        return given, {"source": "given batches"}
    if loaded.processor is None:
        raise DataError(
            f"{loaded.name} has no tokenizer, so text cannot be used: pass processor=, or batches of tensors as data="
        )
    built = build(
        load_texts(arguments.dataset, column=arguments.text_column),
        loaded.processor,
        samples=arguments.samples,
        seq_len=arguments.seq_len(getattr(loaded.model, "config", None)),
        seed=arguments.seed,
        pack=arguments.concatenate_data,
        at_most=arguments.num_calibration_samples is None,
    )
    longest = max(len(sample) for sample in built.samples)
    size = arguments.batch_size
    if size is None:
        size = samples_a_batch(loaded.model, longest, arguments.compute_device())
    return batches(built, size), built.describe()


def _perplexity(
    loaded: LoadedModel, wanted: bool, arguments: DatasetArguments, progress: Progress, clock: _Clock, name: str
) -> float | None:
    if not wanted:
        return None
    home = next(loaded.model.parameters()).device
    loaded.model.to(arguments.compute_device())
    try:
        with clock(name):
            return evaluate_model(loaded.model, tokenizer=loaded.processor, progress=progress).perplexity
    finally:
        loaded.model.to(home)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


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
        import hashlib

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


__all__ = ["ALGORITHMS", "calibrate", "plan", "quantize"]
