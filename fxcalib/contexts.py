"""The modes of a thread that change what torch computes: autocast, grad mode and inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@dataclass(frozen=True)
class Autocast:
    """Whether a device type computes in lower precision, and in which."""

    device: str
    enabled: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device} {self.dtype}" if self.enabled else f"{self.device} off"


@dataclass(frozen=True)
class Contexts:
    """The modes that hold at one place of a program."""

    autocast: tuple[Autocast, ...]
    caches_casts: bool
    grad: bool
    inference: bool

    @classmethod
    def current(cls) -> Contexts:
        """Those that hold here and now."""
        return cls(
            tuple(
                Autocast(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in _device_types()
            ),
            torch.is_autocast_cache_enabled(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have them hold inside, and afterwards again what held before."""
        before = Contexts.current()
        with torch.inference_mode(self.inference):
            self._set()
            try:
                yield
            finally:
                before._set()

    def _set(self) -> None:
        for autocast in self.autocast:
            torch.set_autocast_enabled(autocast.device, autocast.enabled)
            torch.set_autocast_dtype(autocast.device, autocast.dtype)
        torch.set_autocast_cache_enabled(self.caches_casts)
        torch.set_grad_enabled(self.grad)
        # what it holds are casts of weights, which are compressed between two visits
        torch.clear_autocast_cache()
