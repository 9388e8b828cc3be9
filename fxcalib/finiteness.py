"""Finds the module that made a NaN or an infinity, once a value that is carried on holds one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcalib.errors import NonFiniteActivationError
from fxcalib.math.finite import finite
from fxcalib.transfers import AHEAD


class FiniteChecks:
    """Holds values that are carried on against NaN and infinity, without waiting for the device batch by batch.

    What a batch gave is judged when `AHEAD` more have been queued; until then its inputs are kept, to find the culprit.
    Padded positions may hold anything.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._open: deque[_Check] = deque()

    def add(
        self, values: Mapping[str, Any], batch: int, token_mask: torch.Tensor | None, rerun: Callable[[], Any]
    ) -> None:
        """Take in floating-point `values` of one batch; `rerun` computes them again.

        Raises:
            NonFiniteActivationError: of this batch or one before it; names the first module, in running order, whose
                result is not finite.
        """
        flags = [flag for value in values.values() if (flag := _flag(value, token_mask)) is not None]
        self._open.append(_Check(batch, token_mask, rerun, [_Flag(flag) for flag in flags]))
        ahead = AHEAD if any(flag.is_cuda for flag in flags) else 0
        while len(self._open) > ahead:
            self._judge(self._open.popleft())

    def finish(self) -> None:
        """Judge what is left; errors as `add`."""
        while self._open:
            self._judge(self._open.popleft())

    def _judge(self, check: _Check) -> None:
        if all(flag.read() for flag in check.flags):
            return
        culprit = _first_culprit(self._model, check.rerun, check.token_mask)
        raise NonFiniteActivationError(
            f"{culprit} returns NaN or infinity on calibration batch {check.batch}. Check its weights and that batch; "
            "a model that overflows in float16 often runs in bfloat16 (--dtype bfloat16)."
        )


class _Flag:
    """A truth on a device, read without waiting for what is queued behind it."""

    def __init__(self, truth: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if truth.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(truth, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(truth.device))
        else:
            self._host = truth

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


@dataclass(frozen=True)
class _Check:
    batch: int
    token_mask: torch.Tensor | None
    rerun: Callable[[], Any]
    flags: Sequence[_Flag]


def _flag(value: Any, token_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Whether all of `value` that is not padding is finite, as a 0-dim tensor; None for what cannot but be."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return None
    if token_mask is not None and value.shape[:2] == token_mask.shape:
        value = torch.where(token_mask.reshape(*token_mask.shape, *[1] * (value.ndim - 2)), value, 0.0)
    return finite(value)


def _first_culprit(model: nn.Module, rerun: Callable[[], Any], token_mask: torch.Tensor | None) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: Any, result: Any) -> None:
        leaves = result if isinstance(result, (tuple, list)) else [result]
        flags = (_flag(leaf, token_mask) for leaf in leaves)
        if not found and not all(flag is None or bool(flag) for flag in flags):
            found.append(f"{names.get(id(module), '?')} ({type(module).__name__})")

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        rerun()
    finally:
        handle.remove()
    return found[0] if found else "the glue between two modules"
