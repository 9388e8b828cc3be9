"""The model that is calibrated, in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.speed.works import Work


def host_model(work: Work, folder: Path | None, device: torch.device, layers: int | None = None) -> Any:
    """The model of `work` in bfloat16, on the CPU and not mapped from a file, the same at each call.

    Args:
        work: its `sizes` are those of a model with random weights, where there is no `folder`.
        folder: the checkpoint of a work without sizes.
        device: where random weights are made, which is faster on an accelerator.
        layers: so many decoder layers with random weights instead, to warm up.
    """
    torch.manual_seed(0)
    if folder is not None and layers is None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        _unmap(model)
        return model.eval()
    config: Any = AutoConfig.from_pretrained(folder) if folder is not None else LlamaConfig(**(work.sizes or {}))
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.cpu().eval()


def _unmap(model: nn.Module) -> None:
    """Copy weights that are mapped from a file, so that reading the file is not measured."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
