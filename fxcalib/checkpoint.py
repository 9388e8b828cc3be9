"""Write a calibrated model as a compressed-tensors checkpoint: all of it or nothing, and the model stays as it is."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.modeling import KV_CACHE_ATTR, QuantizedKVCache
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils.match import match_named_modules, match_targets
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from fxcalib.errors import OutputError
from fxcalib.experts import GROUP, has_unquantized_experts, leave_experts
from fxcalib.loading import PROCESSOR_FILES, progress_bars_disabled
from fxcalib.report import Report

REPORT_NAME = "fxcalib_report.json"
RECIPE_NAME = "recipe.yaml"
MAX_SHARD_SIZE = "4GB"
QUANTIZABLE = (nn.Linear, nn.Embedding)
"""Classes of modules that readers give the scheme of a target."""

_COPIED_FILES = (*PROCESSOR_FILES, "generation_config.json", "LICENSE*")


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a checkpoint is and how large."""

    path: Path
    bytes: int
    """Size of all its files."""


def prepare_output(path: str | Path, *, overwrite: bool = False, source: Path | None = None) -> Path:
    """The absolute folder that a checkpoint may be written to. Nothing is created; call it before any work.

    An existing folder must be empty, or with `overwrite` hold a checkpoint that fxcalib wrote; `source`, the folder
    that the model is read from, is never overwritten.

    Raises OutputError for a folder that is in use or cannot be written.
    """
    output = Path(path).expanduser().absolute()
    if output.exists() and not output.is_dir():
        raise OutputError(f"output {str(output)!r} is a file; give the name of a new folder")
    if source is not None and output.resolve() == source.resolve():
        raise OutputError(f"output {str(output)!r} is the folder of the model itself; give another folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise OutputError(f"output folder {str(output)!r} is not empty; give a new one or pass --overwrite")
        if not (output / REPORT_NAME).is_file():
            raise OutputError(
                f"output folder {str(output)!r} holds files that fxcalib did not write (no {REPORT_NAME}), "
                "which --overwrite does not delete; give a new folder"
            )
    existing = next(parent for parent in output.parents if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"output {str(output)!r} cannot be created: {str(existing)!r} is a file")
    probe = existing / f".{output.name}.{secrets.token_hex(4)}.probe"
    try:
        probe.mkdir()  # the permission bits alone tell neither of read-only file systems nor of quotas
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"output folder {str(output)!r} cannot be written: {str(existing)!r}: {error.strerror}; give another folder"
        ) from error
    return output


def save(
    model: nn.Module,
    output: str | Path,
    *,
    processor: Any = None,
    source: Path | None = None,
    report: Report | None = None,
    recipe: str | None = None,
    overwrite: bool = False,
) -> SavedCheckpoint:
    """Write `model` with compressed weights to the folder `output`; the model itself is not changed.

    The folder holds safetensors shards, `config.json` with the quantization config, the generation config, the
    tokenizer or processor (the files of `source` where it has them, else what `processor` saves), the model's own code
    if it has some, the report, and the recipe, which is given as text. It appears under its name when all of it is on
    the disk, and not at all on failure.

    Raises OutputError for a folder that is in use or cannot be written.
    """
    target = prepare_output(output, overwrite=overwrite, source=source)
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staged(target) as staging:
            _write(model, staging, processor, source)
            if report is not None:
                _write_json(staging / REPORT_NAME, report.to_dict())
            if recipe is not None:
                (staging / RECIPE_NAME).write_text(recipe, encoding="utf-8")
            files = [file for file in staging.rglob("*") if file.is_file()]
            mode = (staging / "config.json").stat().st_mode
            for file in files:
                file.chmod(mode)  # safetensors lets only the owner read what it writes
            size = sum(map(_sync, files))
        return SavedCheckpoint(path=target, bytes=size)
    except OSError as error:
        _remove_empty(created)
        raise OutputError(
            f"checkpoint {str(target)!r} could not be written: {error.strerror or error}; "
            "nothing was left behind, free space or give another folder"
        ) from error
    except BaseException:
        _remove_empty(created)
        raise


def compressed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State of `model` as a checkpoint holds it: qualified name -> tensor, quantized modules compressed.

    Tensors that compression does not touch are those of the model, not copies; tied ones stay tied.
    """
    state = model.state_dict()
    compressed: dict[int, dict[str, torch.Tensor]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_module_quantized(module):
            continue
        prefix = f"{name}." if name else ""
        local = {
            key: state.pop(f"{prefix}{key}")
            for key, _ in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            if f"{prefix}{key}" in state
        }
        if id(module) not in compressed:
            compressed[id(module)] = _compress(module, local)
        state.update({f"{prefix}{key}": tensor for key, tensor in compressed[id(module)].items()})
    return state


def quantization_config(model: nn.Module) -> QuantizationConfig | None:
    """The config that gives each module of `model` the scheme it has when the checkpoint is loaded; None without any.

    Where the targets of the schemes do not tell the modules apart, they are replaced by the modules' names.
    """
    for module in model.modules():
        if is_module_quantized(module) and not _caches(module):
            _scheme(module).format = _format(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    config: QuantizationConfig | None = copy.deepcopy(compressor.quantization_config)
    if config is None:
        return None
    _move_cache_scheme(model, config)
    config.quantization_status = QuantizationStatus.COMPRESSED
    # Names are matched against the module tree when transformers loads, and against checkpoint names elsewhere.
    quantizable = {name for name, module in model.named_modules() if name and isinstance(module, QUANTIZABLE)}
    ignored = {name for name in quantizable if not is_module_quantized(model.get_submodule(name))}
    targeted = {name for name, _ in match_named_modules(model, _targets(config), config.ignore)}
    config.ignore = sorted({*(config.ignore or ()), *(targeted & ignored)})
    if not _reproduces(model, config):
        names = _names_by_group(model, config)
        for group, scheme in config.config_groups.items():
            assert isinstance(scheme, QuantizationScheme)
            scheme.targets = names[group]
    if has_unquantized_experts(model):
        leave_experts(config)
    return config


def _write(model: nn.Module, folder: Path, processor: Any, source: Path | None) -> None:
    state = compressed_state(model)
    config = quantization_config(model)
    if isinstance(model, PreTrainedModel):
        with progress_bars_disabled(), _lenient_generation_config(model, folder):
            model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    else:
        _write_json(folder / "config.json", {"architectures": [type(model).__name__]})
        save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
    if config is not None:
        transforms = getattr(model, "transform_config", None)
        ModelCompressor(quantization_config=config, transform_config=transforms).update_config(str(folder))
        _help_transformers(model, config, folder / "config.json")
    if isinstance(model, PreTrainedModel) and _is_tie_broken(model):
        _untie(folder / "config.json")
    copied = _copy_from(source, folder) if source is not None else False
    if processor is not None and not copied:
        processor.save_pretrained(folder)


def _compress(module: nn.Module, local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    compressor = BaseCompressor.get_value_from_registry(_format(module).value)
    weights = _scheme(module).weights
    if weights is not None and weights.type == QuantizationType.INT:
        # the integers are found by division: in bfloat16 those of 8 bits would come out one off now and then
        local = {**local, "weight": local["weight"].float()}
    compressed: dict[str, torch.Tensor] = compressor.compress(local, _scheme(module))
    return {key: tensor for key, tensor in compressed.items() if tensor is not None}


def _format(module: nn.Module) -> CompressionFormat:
    scheme = _scheme(module)
    return CompressionFormat(scheme.format or infer_module_format(type(module), scheme))


def _scheme(module: nn.Module) -> QuantizationScheme:
    return module.quantization_scheme


def _targets(config: QuantizationConfig) -> dict[str, str]:
    """Target -> group, in the order in which compressed-tensors resolves them."""
    groups = config.config_groups.items()
    return {t: name for name, scheme in groups if isinstance(scheme, QuantizationScheme) for t in scheme.targets}


def _reproduces(model: nn.Module, config: QuantizationConfig) -> bool:
    """Whether loading with `config` attaches to each module the scheme that it has, and none to the others."""
    targets = _targets(config)
    matched = {
        name: config.config_groups[targets[match_targets(name, module, targets)[0]]]
        for name, module in match_named_modules(model, targets, config.ignore)
        if isinstance(module, QUANTIZABLE)
    }
    wanted = {
        name: _scheme(module)
        for name, module in model.named_modules()
        if is_module_quantized(module) and isinstance(module, QUANTIZABLE)
    }
    return matched == wanted


def _names_by_group(model: nn.Module, config: QuantizationConfig) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {group: [] for group in config.config_groups}
    for name, module in model.named_modules():
        if is_module_quantized(module):
            group = next((g for g, s in config.config_groups.items() if s == _scheme(module)), None)
            if group is not None:
                names[group].append(name)
    return names


@contextmanager
def _lenient_generation_config(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Save the generation config as it is: `save_pretrained` would refuse what many models ship, after all the work."""
    original = getattr(model, "generation_config", None)
    if not isinstance(original, GenerationConfig):
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original
    if model.can_generate():
        original.to_json_file(folder / "generation_config.json")


def _is_tie_broken(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are declared tied, but one of them is quantized and so stored on its own."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(end is not None and is_module_quantized(end) for end in ends)


def _caches(module: nn.Module) -> bool:
    """Whether `module` is attention whose cache is quantized, not itself."""
    return is_module_quantized(module) and isinstance(getattr(module, KV_CACHE_ATTR, None), QuantizedKVCache)


def _move_cache_scheme(model: nn.Module, config: QuantizationConfig) -> None:
    # compressed-tensors 0.20 does not know the attention of transformers 5.24 and takes it for a group of modules
    cached = [_scheme(module) for module in model.modules() if _caches(module)]
    if cached:
        config.kv_cache_scheme = cached[0].input_activations
        groups = [scheme for scheme in config.config_groups.values() if scheme not in cached]
        config.config_groups = {f"group_{index}": scheme for index, scheme in enumerate(groups)}


def _help_transformers(model: nn.Module, config: QuantizationConfig, config_path: Path) -> None:
    """Let transformers dequantize while it loads where it cannot else, and warn of what it cannot load even so.

    transformers 5.24 makes room for packed zero points as if they were not packed, and refuses them; all versions
    initialize the `weight` of embeddings, which packed ones have none of.
    """
    quantized = {name: module for name, module in model.named_modules() if is_module_quantized(module)}
    packed = {n: m for n, m in quantized.items() if not _caches(m) and "pack" in _format(m).value}
    embeddings = [name for name, module in packed.items() if isinstance(module, nn.Embedding)]
    refused = [*embeddings, *(name for name, module in packed.items() if _packs_zero_points(module))]
    alone = _is_weights_alone(config)
    if refused and alone:
        _dequantize_on_load(config_path)
    if embeddings or (refused and not alone):
        which = "before 5.24 does not load" if alone else "5.24 loads only where one scheme of weights is all there is"
        warnings.warn(
            f"{refused[0]!r} is stored packed, which transformers {which}; vLLM does. "
            "With format='int-quantized' in the scheme, every version of transformers loads it",
            stacklevel=4,
        )


def _packs_zero_points(module: nn.Module) -> bool:
    weights = _scheme(module).weights
    each = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    packs = _format(module) == CompressionFormat.pack_quantized
    return packs and weights is not None and not weights.symmetric and weights.strategy in each


def _is_weights_alone(config: QuantizationConfig) -> bool:
    """Whether dequantizing weights is all there is to do: transformers does so by one scheme, and forgets the rest."""
    schemes = [scheme for name, scheme in config.config_groups.items() if name != GROUP]
    activations = [scheme.input_activations or scheme.output_activations for scheme in schemes]
    return len(schemes) == 1 and not any(activations) and config.kv_cache_scheme is None


def _dequantize_on_load(config_path: Path) -> None:
    # it would dequantize in the first forward anyhow, and other readers do not know the key
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    _write_json(config_path, config)


def _untie(config_path: Path) -> None:
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    _write_json(config_path, config)


def _copy_from(source: Path, folder: Path) -> bool:
    """Copy what belongs to a model beside its weights and config; whether a tokenizer or processor was among it."""
    for pattern in _COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            destination = folder / file.name
            if file.is_dir():
                shutil.copytree(file, destination, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, destination)  # follows the links of the hub cache
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("auto_map"):
        for file in sorted(source.glob("*.py")):
            shutil.copyfile(file, folder / file.name)
    return any(any(source.glob(pattern)) for pattern in PROCESSOR_FILES)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the body succeeds and vanishes when it fails."""
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    staging = target.parent / f".{target.name}.{mark}.partial"
    replaced = target.parent / f".{target.name}.{mark}.replaced"
    staging.mkdir()
    try:
        yield staging
        _sync(staging)
        if target.exists():
            target.rename(replaced)
        try:
            staging.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> int:
    """Wait until a file or folder is on the disk; its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        try:
            folder.rmdir()
        except OSError:
            return  # never created, or somebody else uses it by now


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
