"""The same calibration by each tool, from a model in memory and ready batches to compressed weights."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.speed.settings import Setting
from benchmarks.speed.works import Work

Calibration = Callable[[], object]

IGNORED = ["lm_head"]


def fxcalib(model: Any, tokens: Tensor, work: Work, setting: Setting, device: torch.device) -> Calibration:
    """`fxcalib.calibrate`, ready to be timed; `tokens` is (sample, token) int64."""
    from fxcalib import calibrate
    from fxcalib.modifiers import GPTQModifier, QuantizationModifier

    kind = GPTQModifier if work.algorithm == "gptq" else QuantizationModifier
    modifier = kind(config_groups=groups(work, setting), ignore=IGNORED)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(tokens, setting.batch_size)
    ]
    pipeline = {} if work.pipeline is None else {"pipeline": work.pipeline}
    options: dict[str, Any] = {**pipeline, **setting.kwargs}
    return lambda: calibrate(model, batches, modifier, device=str(device), **options)


def llmcompressor(model: Any, tokens: Tensor, work: Work, setting: Setting, device: torch.device) -> Calibration:
    """`llmcompressor.oneshot`, ready to be timed; it computes on the accelerator wherever there is one."""
    # not a dependency, so type checking must do without
    oneshot = importlib.import_module("llmcompressor").oneshot
    algorithm, name = ("gptq", "GPTQModifier") if work.algorithm == "gptq" else ("quantization", "QuantizationModifier")
    kind = getattr(importlib.import_module(f"llmcompressor.modifiers.{algorithm}"), name)
    samples: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    batches = DataLoader(samples, batch_size=setting.batch_size)
    pipeline = {} if work.pipeline is None else {"pipeline": work.pipeline}
    processor = _processor(model)
    recipe = kind(config_groups=groups(work, setting), ignore=IGNORED)
    return lambda: oneshot(
        model=model, processor=processor, dataset=batches, recipe=recipe, **pipeline, **setting.kwargs
    )


CALIBRATIONS = {"fxcalib": fxcalib, "llmcompressor": llmcompressor}


def groups(work: Work, setting: Setting) -> dict[str, QuantizationScheme]:
    """The scheme of `work` as config groups, which both tools take."""
    observer = {} if setting.observer is None else {"observer": setting.observer}
    scheme = {**work.scheme, "weights": {**work.scheme["weights"], **observer}}
    return {"group_0": QuantizationScheme(targets=["Linear"], **scheme)}


def _processor(model: Any) -> Any:
    """A tokenizer that never tokenizes: llm-compressor wants one, and a folder that the model seems to be from."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    folder = tempfile.mkdtemp(dir=".")  # the worker's folder is removed with all that is in it
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = folder
    return processor
