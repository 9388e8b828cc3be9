"""What a checkpoint takes on the disk, and in host memory while it is made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from torch import nn
from torch.overrides import TorchFunctionMode

from fxcalib.checkpoint import compressed_state
from fxcalib.prediction.tracking import Allocations
from fxcalib.tracing.preserve import fake_weights
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.torch_private import FakeTensorMode


@dataclass(frozen=True)
class Saved:
    """A checkpoint in bytes."""

    disk_bytes: int = 0
    """Size of its tensors."""
    held_bytes: int = 0
    """Compressed tensors that are held beside the model until all of it is written."""
    working_bytes: int = 0
    """Most bytes of temporaries at once while one module is compressed."""


class _NoCodeAcrossWords(TorchFunctionMode):
    """Answers the one question that packing asks of data: codes of 4 or 8 bits never reach into the next word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


def saved(model: nn.Module) -> Saved:
    """What saving `model` takes. Its modifiers are attached; each kind of module is compressed once, on fakes."""
    total = unique_bytes(model)
    held, working = 0, 0
    kinds: dict[Hashable, tuple[int, int]] = {}
    for module in model.modules():
        if not is_module_quantized(module):
            continue
        own = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False))
        kind = (own, str(module.quantization_scheme))
        if kind not in kinds:
            kinds[kind] = _compress(module)
        made, temporary = kinds[kind]
        held += made
        working = max(working, temporary)
        total += made - sum(p.nbytes for p in module.parameters(recurse=False))
    return Saved(total, held, working)


def unique_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers of `modules`, tied ones counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _compress(module: nn.Module) -> tuple[int, int]:
    """Bytes of a module's compressed tensors, and of the temporaries while they are made."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=Sizes())
    tracker = Allocations(1)
    with torch.no_grad(), fake_weights(module, mode, torch.device("cpu")), mode, _NoCodeAcrossWords():
        for parameter in module.parameters():
            tracker.ignore(parameter)
        with tracker:
            state = compressed_state(module)
        return sum(t.nbytes for t in state.values()), tracker.peak - tracker.live
