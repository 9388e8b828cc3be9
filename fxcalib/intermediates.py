"""The values that live between subgraphs, for every batch, and where they lie while another batch runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcalib.errors import OptionError

OFFLOADS = ("cpu", "none")


def storage_device(offload: str, device: torch.device) -> torch.device:
    """Where intermediates lie between batches: `cpu`, `none` (they stay on the device that computes) or a device.

    Raises:
        OptionError: `offload` is none of these.
    """
    if offload == "none":
        return device
    try:
        return torch.device(offload)
    except RuntimeError:
        raise OptionError(f"offload {offload!r} is neither 'cpu', 'none' nor a device such as 'cuda:1'") from None


class Intermediates:
    """Values by batch and name. Tensors are stored on `storage` and handed out on `device`."""

    def __init__(self, device: torch.device, storage: torch.device) -> None:
        self._device, self._storage = device, storage
        self._batches: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, values: Mapping[str, Any]) -> None:
        """Store the inputs of one more batch."""
        self._batches.append({})
        self.store(len(self._batches) - 1, values)

    def store(self, batch: int, values: Mapping[str, Any]) -> None:
        """Store values of batch number `batch`."""
        for name, value in values.items():
            self._batches[batch][name] = _moved(value, self._storage)

    def load(self, batch: int, names: Iterable[str], *, private: Collection[str] = ()) -> dict[str, Any]:
        """Values of batch number `batch` on the device that computes; those in `private` may be written to."""
        loaded = {}
        for name in names:
            value = self._batches[batch][name]
            moved = _moved(value, self._device)
            loaded[name] = _copied(moved) if name in private and moved is value else moved
        return loaded

    def free(self, batch: int, names: Iterable[str]) -> None:
        """Forget values of batch number `batch`."""
        for name in names:
            self._batches[batch].pop(name, None)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        leaves = (leaf for values in self._batches for leaf in pytree.tree_leaves(values))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list, dict)):
        return _each_tensor(value, lambda t: t.to(device))
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list, dict)):
        return _each_tensor(value, torch.clone)
    return copy.deepcopy(value)


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return pytree.tree_map_only(torch.Tensor, change, value)
