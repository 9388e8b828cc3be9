"""The values that live between subgraphs, for every batch, and where they lie while another batch runs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcalib.errors import OptionError

OFFLOADS = ("cpu", "none")


def storage_device(offload: str, device: torch.device) -> torch.device:
    """Where intermediates lie between batches: `cpu`, `none` (they stay on the device that computes) or a device.

    Raises:
        OptionError: `offload` is none of these, or a device that is not here.
    """
    if offload == "none":
        return device
    try:
        storage = torch.device(offload)
    except (RuntimeError, TypeError):
        raise OptionError(f"offload {offload!r} is neither 'cpu', 'none' nor a device such as 'cuda:1'") from None
    if storage.type == "meta":
        raise OptionError("offload 'meta' keeps no values, and intermediates are read again; use 'cpu' or 'none'")
    try:
        torch.empty(0, device=storage)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"offload {offload!r} cannot be used here: {reason}; use 'cpu' or 'none'") from error
    return storage


class Intermediates:
    """Values by batch and name. Tensors are stored on `storage` and handed out on `device`."""

    def __init__(self, device: torch.device, storage: torch.device) -> None:
        self._device, self._storage = device, storage
        self._batches: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, values: Mapping[str, Any], *, shared: Collection[str] = ()) -> None:
        """Store the inputs of one more batch; of those in `shared` a copy, as the batch is the caller's."""
        copied = copy.deepcopy({name: values[name] for name in shared if name in values})
        self._batches.append({})
        self.store(len(self._batches) - 1, {**values, **copied}, shared=shared)

    def store(self, batch: int, values: Mapping[str, Any], *, shared: Collection[str] = ()) -> None:
        """Store values of batch number `batch`.

        Those in `shared` are written to in place while other values may be views of them: they stay where they are.
        """
        for name, value in values.items():
            where = self._device if name in shared else self._storage
            self._batches[batch][name] = _moved(value, where)

    def load(self, batch: int, names: Iterable[str], *, private: Collection[str] = ()) -> dict[str, Any]:
        """Values of batch number `batch` on the device that computes; those in `private` as copies to write to."""
        stored = self._batches[batch]
        loaded = {name: _moved(stored[name], self._device) for name in names}
        # one call for all of them: values that share memory still do in the copy
        return {**loaded, **copy.deepcopy({name: loaded[name] for name in private})}

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
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)
    return value
