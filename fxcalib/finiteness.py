"""Finds the module that made a NaN or an infinity, once a value that is carried on holds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcalib.errors import NonFiniteActivationError
from fxcalib.math.finite import all_finite


def check_finite(
    values: Mapping[str, Any],
    batch: int,
    token_mask: torch.Tensor | None,
    rerun: Callable[[], Any],
    model: nn.Module,
) -> None:
    """Hold floating-point `values` of one batch against NaN and infinity. Padded positions may hold anything.

    Raises:
        NonFiniteActivationError: names the first module, in running order, whose result is not finite.
    """
    if all(_finite(value, token_mask) for value in values.values()):
        return
    culprit = _first_culprit(model, rerun, token_mask)
    raise NonFiniteActivationError(
        f"{culprit} returns NaN or infinity on calibration batch {batch}. Check its weights and that batch; "
        "a model that overflows in float16 often runs in bfloat16 (--dtype bfloat16)."
    )


def _finite(value: Any, token_mask: torch.Tensor | None) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    if all_finite(value):
        return True
    padded = token_mask is not None and value.shape[:2] == token_mask.shape
    return padded and all_finite(value[token_mask])


def _first_culprit(model: nn.Module, rerun: Callable[[], Any], token_mask: torch.Tensor | None) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: Any, result: Any) -> None:
        leaves = result if isinstance(result, (tuple, list)) else [result]
        if not found and not all(_finite(leaf, token_mask) for leaf in leaves):
            found.append(f"{names.get(id(module), '?')} ({type(module).__name__})")

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        rerun()
    finally:
        handle.remove()
    return found[0] if found else "the glue between two modules"
