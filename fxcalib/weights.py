"""Residency of parameters: a subgraph's weights lie on the device that computes only while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn


class Residency:
    """Moves modules to the device that computes and back to where they were."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._away: dict[int, tuple[nn.Module, torch.device]] = {}

    @property
    def complete(self) -> bool:
        """Whether all parameters and buffers already lie on the device that computes."""
        return all(_same(t.device, self._device) for t in chain(self._model.parameters(), self._model.buffers()))

    def load(self, modules: Sequence[nn.Module]) -> None:
        """Bring parameters and buffers of `modules` to the device, keeping every parameter the object that it is."""
        for module in modules:
            held = next(chain(module.parameters(), module.buffers()), None)
            if held is not None and not _same(held.device, self._device):
                self._away[id(module)] = (module, held.device)
                module.to(self._device)

    def unload(self, modules: Sequence[nn.Module]) -> None:
        """Bring them back, with what was added to them in the meantime."""
        for module in modules:
            _, home = self._away.pop(id(module), (None, None))
            if home is not None:
                module.to(home)

    def unload_all(self) -> None:
        """Bring back whatever is still away."""
        self.unload([module for module, _ in self._away.values()])


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.type == "cpu" or (a.index or 0) == (b.index or 0))
