"""What a run would do and take, before anything is loaded: `quantize` with the same options, planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxcalib.algorithms import Choice, chosen_modifiers
from fxcalib.arguments import DatasetArguments
from fxcalib.batch_size import samples_a_batch
from fxcalib.checkpoint import prepare_output
from fxcalib.errors import OptionError, nearest
from fxcalib.loading import DTYPES, load_skeleton, refuse_kind, refuse_quantized
from fxcalib.modifiers import Modifier
from fxcalib.patterns import targets_of
from fxcalib.pipelines import CalibrationPipeline
from fxcalib.recipes import Recipe

if TYPE_CHECKING:
    from fxcalib.prediction import DryRun


def plan(
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

    choice = Choice(algorithm, scheme, group_size, ignore, smoothquant, sparsity, mask_structure, kv_cache_scheme)
    chosen = chosen_modifiers(choice, modifiers, recipe)
    flow = CalibrationPipeline.from_modifiers(chosen, pipeline)
    refuse_kind(model)
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
    if isinstance(chosen, Recipe):
        chosen.refuse_conflicts(skeleton)
    if output is not None:
        source = Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
        prepare_output(output, overwrite=overwrite, source=source)
    arguments = DatasetArguments(
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
