"""Residency of parameters: a subgraph's weights lie on the device that computes only while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Residency:
    """Moves modules to the device that computes and back to where they were."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[int, nn.Module] = {}
        self._home = {id(tensor): tensor.device for tensor in [*model.parameters(), *model.buffers()]}

    @property
    def complete(self) -> bool:
        """Whether everything already lies on the device that computes."""
        return all(_same(device, self._device) for device in self._home.values())

    def load(self, modules: Sequence[nn.Module]) -> None:
        """Bring parameters and buffers of `modules` to the device, keeping every parameter the object that it is."""
        for module in modules:
            self._loaded[id(module)] = module
            module.to(self._device)

    def unload(self, modules: Sequence[nn.Module]) -> None:
        """Bring them back, with what was added to them in the meantime."""
        for module in modules:
            self._loaded.pop(id(module), None)
            tensors = [*module.parameters(), *module.buffers()]
            homes = [self._home[id(t)] for t in tensors if id(t) in self._home]
            if homes:
                module.to(homes[0])

    def unload_all(self) -> None:
        """Bring back whatever is still away."""
        self.unload(list(self._loaded.values()))


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.type == "cpu" or (a.index or 0) == (b.index or 0))
