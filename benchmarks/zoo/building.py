"""An architecture becomes a case: a tiny model, its batches, what it returns for them, and its targets."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from benchmarks.zoo import outputs
from benchmarks.zoo.architectures import PLAIN, REMOTE_CODE, Architecture
from benchmarks.zoo.configs import config_for, parts
from benchmarks.zoo.errors import NotBuilt, cause
from benchmarks.zoo.generic import usual_batch
from benchmarks.zoo.inputs import Batch, Draw, first_row
from benchmarks.zoo.targets import TargetSets, target_sets

MOST_PARAMETERS = 70_000_000
"""Most models have less than a million; some convolutional ones have no width to turn down."""

EAGER, SDPA = "eager", "sdpa"
TEXT_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs", "decoder_input_ids")


@dataclass(frozen=True)
class Reference:
    """What the model itself returns for a batch."""

    tensors: Mapping[str, torch.Tensor]
    structure: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Case:
    """A model to be scored."""

    architecture: Architecture
    model: nn.Module
    batches: tuple[Batch, ...]
    """The one to trace with; one with other rows, lengths and padding; and an unpadded row of that where it has one."""
    references: tuple[Reference, ...]
    targets: TargetSets
    parameters: int
    deterministic: bool
    """Whether the model gives the same bits twice."""
    sensitive: bool
    """Whether another input gives another output; else equal bits say little."""


def build(architecture: Architecture, attention: str = EAGER) -> Case:
    """Build the case of `architecture` with `attention`, an implementation that transformers knows.

    Raises:
        NotBuilt: it cannot be built tiny, does not take this attention, or does not run.
    """
    with _staged("init"):
        model = _model(architecture, attention)
    model.eval()
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotBuilt("tiny", f"{count / 1e6:.0f} million parameters after shrinking")
    _disturb(model, _seed(architecture))
    with _staged("inputs"):
        batches = [_batch(architecture, model, second) for second in (False, True)]
    with _staged("eager"):
        references = [reference(model, batch) for batch in batches]
    row = first_row(batches[1], rows=3)
    if row is not None:
        try:
            references.append(reference(model, row))
            batches.append(row)
        except Exception as error:  # features of all rows in one tensor may not be told apart by their sizes
            if architecture.category in ("causal_lm", "masked_lm", "seq2seq"):
                raise NotBuilt("eager", f"an unpadded row: {cause(error)}") from error
    if any(not kept.tensors for kept in references):
        raise NotBuilt("eager", "no tensor in its output")
    main = outputs.main_tensor(references[0].tensors)
    if main.is_floating_point() and not bool(torch.isfinite(main).any()):
        raise NotBuilt("eager", "its output is not finite")
    again = reference(model, batches[0])
    with _staged("targets"):
        targets = target_sets(model, batches[0])
        if not targets.default or not targets.decoder:
            raise NotBuilt("targets", "it calls no submodule")
    return Case(
        architecture,
        model,
        tuple(batches),
        tuple(references),
        targets,
        count,
        outputs.difference(references[0].tensors, again.tensors) is None,
        _sensitive(model, batches[0], references[0]),
    )


def reference(model: nn.Module, batch: Mapping[str, Any]) -> Reference:
    """Run the model itself, from a fixed random state."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**outputs.copied(batch))
    found = {key: tensor.clone() for key, tensor in outputs.tensors(result).items()}
    return Reference(found, outputs.structure(result))


def has_sdpa(model: nn.Module) -> bool:
    """Whether the class of `model` says that it can attend with sdpa."""
    return bool(getattr(model, "_supports_sdpa", False)) and isinstance(
        getattr(model, "config", None), PretrainedConfig
    )


def _model(architecture: Architecture, attention: str) -> nn.Module:
    from benchmarks.zoo.outside import PLAIN_MODELS, remote_model

    torch.manual_seed(_seed(architecture))
    if architecture.category == PLAIN:
        return PLAIN_MODELS[architecture.class_name].make()
    if architecture.category == REMOTE_CODE:
        return remote_model(architecture.model_type, attention)
    model_class = getattr(transformers, architecture.class_name, None)
    if model_class is None:
        raise NotBuilt("import", "transformers exports no such class")
    if "dummy" in model_class.__module__:
        raise NotBuilt("import", f"needs a package that is not installed: {getattr(model_class, '_backends', '')}")
    with _staged("config"):
        config = config_for(architecture.model_type, model_class)
    for part in parts(config):
        if getattr(part, "use_cache", None) is True:
            part.use_cache = False
    _check_size(model_class, config)
    torch.manual_seed(_seed(architecture))
    return _from_config(model_class, config, attention)


def _from_config(model_class: Any, config: PretrainedConfig, attention: str) -> nn.Module:
    choices: list[dict[str, str]] = [
        {"attn_implementation": attention, "experts_implementation": EAGER},
        {"attn_implementation": attention},
    ]
    if attention == EAGER:
        choices.append({})
    refused: Exception | None = None
    for choice in choices:
        try:
            model: nn.Module = model_class._from_config(copy.deepcopy(config), dtype=torch.float32, **choice)
            return model
        except Exception as error:
            refused = refused or error
            if not any(word in str(error) for word in ("ttention", "attn_implementation", "experts")):
                raise
    assert refused is not None
    raise refused


def _check_size(model_class: Any, config: PretrainedConfig) -> None:
    """Refuse a model that did not get small, before its weights are made."""
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except Exception:
        return  # not all can be made on the meta device; the size is held against the limit once it is made
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotBuilt("tiny", f"{count / 1e6:.0f} million parameters after shrinking")


def _disturb(model: nn.Module, seed: int) -> None:
    """Add noise to all weights: many begin as zeros or ones, under which mistakes go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            scale = 0.05 if parameter.ndim > 1 else 0.02
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def _batch(architecture: Architecture, model: nn.Module, second: bool) -> Batch:
    from benchmarks.zoo.families import INPUTS
    from benchmarks.zoo.outside import PLAIN_MODELS, REMOTE_INPUTS

    if architecture.category == PLAIN:
        return PLAIN_MODELS[architecture.class_name].batch(second)
    config: Any = model.config
    draw = Draw(architecture, model, config, second)
    if architecture.category == REMOTE_CODE:
        return REMOTE_INPUTS.get(architecture.model_type, usual_batch)(draw)
    keys = (f"{architecture.category}/{architecture.model_type}", architecture.class_name, architecture.model_type)
    known = [INPUTS[key] for key in keys if key in INPUTS]
    return (known[0] if known else usual_batch)(draw)


def _sensitive(model: nn.Module, batch: Batch, expected: Reference) -> bool:
    changed = outputs.copied(batch)
    name = next((name for name in TEXT_INPUTS if name in changed), next(iter(changed)))
    value = changed[name]
    changed[name] = value * 0.5 + 0.1 if value.is_floating_point() else value.flip(-1)
    try:
        return outputs.difference(expected.tensors, reference(model, changed).tensors) is not None
    except Exception:  # flipped placeholders do not fit the images
        return True


def _seed(architecture: Architecture) -> int:
    return int(hashlib.sha1(architecture.model_type.encode()).hexdigest()[:6], 16)


@contextmanager
def _staged(stage: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except NotBuilt:
            raise
        except Exception as error:
            raise NotBuilt(stage, cause(error)) from error
