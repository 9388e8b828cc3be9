"""The two calls most users need: `calibrate` compresses a model in place, `quantize` also loads, evaluates, saves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fxcalib.algorithms import ALGORITHMS, Choice, chosen_modifiers, listed
from fxcalib.arguments import DatasetArguments
from fxcalib.batch_size import samples_a_batch
from fxcalib.calibration import run
from fxcalib.checkpoint import prepare_output, save
from fxcalib.data import batches, build, load_texts
from fxcalib.errors import DataError, ModelError, RecipeError
from fxcalib.evaluation import evaluate as evaluate_model
from fxcalib.loading import LoadedModel, load, refuse_kind, refuse_meta, refuse_non_finite, refuse_quantized
from fxcalib.modifiers import Modifier
from fxcalib.patterns import targets_of
from fxcalib.pipelines import CalibrationPipeline
from fxcalib.progress import Progress
from fxcalib.recipes import dump_recipe
from fxcalib.report import Report
from fxcalib.run_plan import plan
from fxcalib.sources import check_source, columns_of


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
        modifiers: what to do, in order; also a recipe, as `fxcalib.recipes.load_recipe` reads it.
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
        sequential_targets=targets_of(targets),
        sequential_targets_per_subgraph=targets_per_subgraph,
        propagate_error=propagate_error,
        suspended=suspended,
        sequential_offload_device=offload,
        device=device,
        seed=seed,
    )
    chosen = listed(modifiers)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {model!r}; calibrate takes an nn.Module, quantize also folders and hub ids")
    refuse_meta(model)
    refuse_non_finite(model)
    progress = progress or Progress()
    try:
        return run(model, dataloader, chosen, pipeline, arguments, progress, profile)
    finally:
        progress.close()


def quantize(
    model: str | Path | nn.Module | None = None,
    *,
    algorithm: str = "gptq",
    scheme: str | Mapping[str, Any] | None = None,
    group_size: int | None = None,
    ignore: str | Sequence[str] | None = None,
    smoothquant: float | None = None,
    sparsity: float | None = None,
    mask_structure: str | None = None,
    kv_cache_scheme: str | Mapping[str, Any] | None = None,
    modifiers: Modifier | Sequence[Modifier] | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    text_column: str | Sequence[str] | None = None,
    completion_only: bool = False,
    streaming: bool = False,
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
        algorithm: `gptq`, `rtn` (round to nearest) or `awq` quantize; `sparsegpt`, `wanda` or `magnitude` prune.
        scheme: a preset of compressed-tensors, such as `W4A16` (the default), `W8A8`, `FP8_DYNAMIC`.
        group_size: columns that share a scale, for schemes that quantize weights in groups; default: the scheme's.
        ignore: modules to leave as they are; default: the output head.
        smoothquant: strength, 0 to 1, of SmoothQuant before the algorithm; None does without.
        sparsity, mask_structure: part of the weights to prune (by default a half), and where: `2:4`, `0:0` (anywhere).
        kv_cache_scheme: `fp8` or `int8`, or quantization arguments, for keys and values; default: as they are.
        modifiers: used instead of all of these where given.
        recipe: used instead of all of these where given: a file in the format of llm-compressor, its text, or a dict.
        data: a text, jsonl, json, csv or parquet file, a folder of those, a `datasets` id, or batches as dicts of
            tensors; default: text that the package ships.
        text_column: of the data, or several, which are joined; default: `text`, `messages`, `conversations`, or
            `prompt` and `completion`. Lists of messages are written by the tokenizer's chat template.
        completion_only: take statistics of completions only: what the assistant says, or the last of several columns.
            A `loss_mask` (batch, sequence) in batches does the same.
        streaming: fetch the rows of a `datasets` id as they are needed, not all of them first.
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
        text_column=columns_of(text_column),
        streaming=streaming,
        use_loss_mask=completion_only,
        num_calibration_samples=samples,
        max_seq_length=seq_len,
        batch_size=batch_size,
        concatenate_data=pack,
        sequential_targets=targets_of(targets),
        sequential_targets_per_subgraph=targets_per_subgraph,
        propagate_error=propagate_error,
        suspended=suspended,
        sequential_offload_device=offload,
        device=device,
        seed=seed,
    )
    try:
        choice = Choice(
            algorithm,
            scheme,
            group_size,
            ignore,
            smoothquant,
            sparsity,
            mask_structure,
            kv_cache_scheme,
        )
        chosen = chosen_modifiers(choice, modifiers, recipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of comes with the run, and into its report
            CalibrationPipeline.from_modifiers(chosen, pipeline)  # options are refused before a model is loaded
        refuse_kind(model)
        if any(modifier.needs_data for modifier in chosen):
            _refuse_data(data, streaming)
        source = Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
        if output is not None:
            prepare_output(output, overwrite=overwrite, source=source)
        progress.phase("load")
        with clock("load"):
            loaded = _load(model, processor, dtype, trust_remote_code)
        with clock("data"):
            given = None if isinstance(data, (str, Path)) else data
            dataloader, described = _data(loaded, chosen, given, arguments)
        text, untold = _recipe_of(chosen, loaded.model)
        before = _perplexity(loaded, evaluate, arguments, progress, clock, "evaluate before")
        report = run(loaded.model, dataloader, chosen, pipeline, arguments, progress, profile)
        clock.seconds["calibrate"] = report.seconds
        after = _perplexity(loaded, evaluate, arguments, progress, clock, "evaluate after")
        by_options = modifiers is None and recipe is None
        report = replace(
            report,
            model=loaded.name,
            algorithm=choice.algorithm if by_options else report.algorithm,
            scheme=(choice.label if by_options else None) or report.scheme,
            notes=(*report.notes, *untold),
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
                    recipe=text,
                    overwrite=overwrite,
                )
        return replace(report, seconds=time.perf_counter() - started, timings=dict(clock.seconds))
    finally:
        progress.close()


def _recipe_of(modifiers: Sequence[Modifier], model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """The recipe that is saved with a checkpoint, or None and why there is none."""
    try:
        return dump_recipe(modifiers, model), ()
    except RecipeError as error:
        return None, (f"no recipe is saved: {error}",)


def _refuse_data(data: object, streaming: bool) -> None:
    if isinstance(data, (str, Path)):
        check_source(data, streaming=streaming)
    elif data is not None and not isinstance(data, Iterable):
        raise DataError(
            f"data is {data!r}, a {type(data).__name__}; give a file, a dataset's id, or batches of tensors"
        )


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
        load_texts(arguments.dataset, column=arguments.text_column, streaming=arguments.streaming, seed=arguments.seed),
        loaded.processor,
        samples=arguments.samples,
        seq_len=arguments.seq_len(getattr(loaded.model, "config", None)),
        seed=arguments.seed,
        pack=arguments.concatenate_data,
        at_most=arguments.num_calibration_samples is None,
        completion_only=arguments.use_loss_mask,
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


__all__ = ["ALGORITHMS", "calibrate", "plan", "quantize"]
