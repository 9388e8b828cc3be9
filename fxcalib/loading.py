"""Bring a model and its tokenizer or processor from a local folder or the Hugging Face hub, or say what is wrong."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import torch
import transformers
from torch import nn
from tqdm.std import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fxcalib.errors import AlreadyQuantizedError, ModelError, NonFiniteWeightError, OptionError, nearest
from fxcalib.math.finite import all_finite

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
"""Tried in this order; the first that names the architecture of the config wins."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
    "chat_template*",
)
"""Patterns of the files that make up a tokenizer or processor."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode without gradients, and what came with it."""

    model: nn.Module
    processor: Any
    """Tokenizer or multimodal processor; None where the source has none."""
    source: Path
    """Folder that it was read from; the snapshot in the cache for a hub id."""
    name: str
    """Hub id, or the name of the local folder."""


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_quantized: bool = False,
) -> LoadedModel:
    """Load `model`, a local folder or a hub id, from safetensors files.

    `dtype` is `auto` (what the checkpoint says) or a name of `DTYPES`. Code that comes with the model runs only with
    `trust_remote_code`. A quantized checkpoint is refused, as it cannot be quantized again, unless `allow_quantized`;
    its weights are then decompressed.

    Raises ModelError for a model that cannot be found or read, AlreadyQuantizedError, NonFiniteWeightError and, for a
    `dtype` or `device` that does not exist, OptionError.
    """
    target_device = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: {nearest(str(dtype), ['auto', *DTYPES])}")
    location, name = _locate(model)
    with progress_bars_disabled(), _without_hopeless_retries(location):
        config = _config(location, trust_remote_code)
        if not allow_quantized:
            _refuse_quantized(name, config)
        source = Path(location) if Path(location).is_dir() else _snapshot(location)
        loaded = _weights(location, name, config, dtype, trust_remote_code)
        processor = _processor(location, source, trust_remote_code)
    refuse_non_finite(loaded)
    loaded.requires_grad_(False)
    return LoadedModel(model=loaded.eval().to(target_device), processor=processor, source=source, name=name)


def load_skeleton(model: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The modules of `model`, a local folder or a hub id, on the meta device: its config is read, no weight is.

    Parameters have the shapes and dtypes of the checkpoint and no values. A config that says it is quantized is
    refused, as `load` refuses it.

    Raises ModelError for a model that cannot be found or built, and AlreadyQuantizedError.
    """
    location, name = _locate(model)
    with progress_bars_disabled(), _without_hopeless_retries(location):
        config = _config(location, trust_remote_code)
        _refuse_quantized(name, config)
        auto_class = _auto_class(name, config)
        try:
            with torch.device("meta"):
                skeleton = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise ModelError(f"model {name!r} needs a package that is not installed: {error}") from error
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise _unreadable(location, error) from error
    assert isinstance(skeleton, nn.Module)
    return skeleton.eval().requires_grad_(False)


def refuse_quantized(model: nn.Module) -> None:
    """Raise AlreadyQuantizedError where the config or a module of `model` says that it is quantized."""
    name = getattr(model, "name_or_path", "") or type(model).__name__
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        _refuse_quantized(name, config)
    for path, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            raise AlreadyQuantizedError(
                f"model {name!r} is already quantized: module {path!r} has a quantization scheme; "
                "start from the original weights"
            )


def refuse_kind(model: object) -> None:
    """Raise ModelError for what is neither None, nor a folder or hub id, nor a module."""
    if model is not None and not isinstance(model, (str, Path, nn.Module)):
        raise ModelError(f"model is {model!r}, a {type(model).__name__}; give a folder, a hub id or an nn.Module")


def refuse_meta(model: nn.Module) -> None:
    """Raise ModelError where a parameter or buffer of `model` has no values, as it lies on the meta device."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ModelError(
                f"{name!r} of {type(model).__name__} lies on the meta device and has no values; load the weights "
                "first, or use fxcalib.plan, which needs none"
            )


def refuse_non_finite(model: nn.Module) -> None:
    """Raise NonFiniteWeightError for the first parameter or buffer of `model` that holds NaN or infinity.

    Only state that a checkpoint holds is looked at: masks kept as non-persistent buffers may hold infinity.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or tensor.dtype.itemsize == 1:
            continue
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteWeightError(
                f"parameter {name!r} holds {bad} NaN or infinite of {tensor.numel()} values; "
                "download the checkpoint again or load it as bfloat16 or float32 if it overflowed as float16"
            )


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Keep the progress bars of transformers and compressed-tensors off the terminal; fxcalib draws its own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    create = tqdm.__init__

    def create_disabled(self: Any, *args: Any, **options: Any) -> None:
        create(self, *args, **{**options, "disable": True})

    tqdm.__init__ = (
        create_disabled  # compressed-tensors asks for its bars explicitly, which overrides tqdm's own switch
    )
    try:
        yield
    finally:
        tqdm.__init__ = create
        if enabled:
            transformers_logging.enable_progress_bar()


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise OptionError(
            f"device {device!r} cannot be used: {cause}; use 'cpu' or an accelerator that is here"
        ) from error
    return found


def _locate(model: str | Path) -> tuple[str, str]:
    """What transformers is to load, and its name; refuses what can be neither a model folder nor a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder), folder.resolve().name
        nested = sorted(f.parent.name for f in folder.glob("*/config.json"))
        hint = f"did you mean {str(folder / nested[0])!r}?" if nested else "give the folder that holds config.json"
        raise ModelError(f"model folder {str(folder)!r} has no config.json; {hint}")
    if folder.exists():
        raise ModelError(f"model {str(folder)!r} is a file; give the folder that holds config.json and the weights")
    text = str(model)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise ModelError(f"model folder {text!r} does not exist; {_similar_folders(folder)}")
    return text, text


def _similar_folders(folder: Path) -> str:
    """A next step for a folder that does not exist: the nearest names beside it, or the nearest parent that exists."""
    parent = folder.parent
    if not parent.is_dir():
        existing = next(p for p in parent.absolute().parents if p.is_dir())
        return f"its parent does not exist either, the nearest folder that does is {str(existing)!r}"
    siblings = [f.name for f in parent.iterdir() if f.is_dir() and not f.name.startswith(".")]
    return nearest(folder.name, siblings) if siblings else f"{str(parent)!r} has no folders"


def _config(location: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(location, error) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _unreadable(location: str, error: Exception) -> ModelError:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(f"model {location!r} brings its own code; read it, then pass --trust-remote-code to run it")
    if Path(location).is_dir():
        return ModelError(f"model {location!r} cannot be loaded: {cause}; check its files and the transformers version")
    similar = f" ({_similar_folders(Path(location))})" if Path(location).parent.is_dir() else ""
    return ModelError(
        f"model {location!r} is no local folder{similar} and could not be had from the hub: {cause.rstrip('.')}; "
        "check the name and the network, or download it and give its folder"
    )


def _refuse_quantized(name: str, config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
            raise AlreadyQuantizedError(
                f"model {name!r} is already quantized (quant_method {str(getattr(method, 'value', method))!r} in its "
                "config.json); start from the original weights"
            )


def _snapshot(location: str) -> Path:
    found = cached_file(location, "config.json")
    assert isinstance(found, str)
    return Path(found).parent


@contextmanager
def _without_hopeless_retries(location: str) -> Iterator[None]:
    """Where the hub's name does not even resolve, look in the cache only, instead of retrying for half a minute."""
    constants = huggingface_hub.constants
    offline = constants.HF_HUB_OFFLINE
    host = urlsplit(constants.ENDPOINT).hostname
    if not Path(location).is_dir() and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _auto_class(name: str, config: PreTrainedConfig) -> Any:
    autos = [(auto, getattr(transformers, auto)) for auto in AUTO_CLASSES if hasattr(transformers, auto)]
    for auto, cls in autos:
        if auto in (getattr(config, "auto_map", None) or {}):
            return cls
    supported = [cls for _, cls in autos if type(config) in cls._model_mapping]
    for cls in supported:
        mapped = cls._model_mapping[type(config)]
        candidates = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
        if {c.__name__ for c in candidates} & set(config.architectures or ()):
            return cls
    if not supported:
        raise ModelError(
            f"no auto class of transformers knows the architecture {config.architectures or type(config).__name__} of "
            f"model {name!r}; load it yourself and pass the model object to fxcalib.quantize"
        )
    return supported[0]


def _weights(location: str, name: str, config: PreTrainedConfig, dtype: str, trust_remote_code: bool) -> nn.Module:
    try:
        model, info = _auto_class(name, config).from_pretrained(
            location,
            config=config,
            dtype=DTYPES.get(dtype, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise ModelError(f"model {name!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if list(Path(location).glob("*.bin")) and not list(Path(location).glob("*.safetensors")):
            raise ModelError(
                f"model {name!r} has its weights in pickle files (*.bin), which can run code when they are read; "
                "convert them to safetensors first"
            ) from error
        raise _unreadable(location, error) from error
    except Exception as error:  # safetensors raises its own type for a file that is cut short or damaged
        if type(error).__module__.partition(".")[0] != "safetensors" and "SafetensorError" not in type(error).__name__:
            raise
        raise ModelError(f"a weight file of model {name!r} is damaged: {error}; download it again") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the checkpoint of model {name!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"such as {missing[0]!r}; they would be random: check the weight files and `architectures` in config.json"
        )
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)  # now, not in the first forward
    assert isinstance(model, nn.Module)
    return model


def _processor(location: str, source: Path, trust_remote_code: bool) -> Any:
    causes = []
    for auto in (AutoProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(location, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            causes.append(f"{auto.__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
    if any(any(source.glob(pattern)) for pattern in PROCESSOR_FILES):
        raise ModelError(f"the tokenizer of model {location!r} cannot be loaded ({'; '.join(causes)})")
    return None
