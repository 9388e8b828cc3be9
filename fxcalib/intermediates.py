"""The values that live between subgraphs, for every batch, and where they lie while another batch runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcalib.errors import OptionError
from fxcalib.transfers import Direct, Transfers, transfers_between

AUTO = "auto"

_SPARE = 0.25
"""Part of a device's memory that `auto` leaves to computing at least."""
_CAUTION = 1.25
"""How much more than the peak so far computing may come to take."""


def storage_device(offload: str, device: torch.device) -> torch.device:
    """Where intermediates lie between batches: `cpu`, `none` (they stay on the device that computes) or a device.

    Of `auto`, it is where what does not fit on the device goes: the CPU.

    Raises:
        OptionError: `offload` is none of these, or a device that is not here.
    """
    if offload == "none":
        return device
    if offload == AUTO:
        return torch.device("cpu")
    try:
        storage = torch.device(offload)
    except (RuntimeError, TypeError):
        raise OptionError(
            f"offload {offload!r} is neither 'auto', 'cpu', 'none' nor a device such as 'cuda:1'"
        ) from None
    if storage.type == "meta":
        raise OptionError("offload 'meta' keeps no values, and intermediates are read again; use 'cpu' or 'none'")
    try:
        torch.empty(0, device=storage)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"offload {offload!r} cannot be used here: {reason}; use 'cpu' or 'none'") from error
    return storage


class Room:
    """How many bytes on a CUDA device can be given to intermediates.

    A quarter of the device's memory is kept back, or a little more than what computing takes where that is more.
    """

    def __init__(self, device: torch.device) -> None:
        free, self._total = torch.cuda.mem_get_info(device)
        self._device, self._before = device, torch.cuda.memory_allocated(device)
        self._available = free + torch.cuda.memory_reserved(device) - self._before
        self._computing = 0

    def beside(self, computing: int) -> int:
        """Bytes for intermediates beside `computing` bytes for everything else."""
        return int(self._available - max(_CAUTION * computing, _SPARE * self._total))

    def now(self, kept: int) -> int:
        """Bytes for intermediates beside the most that everything else has taken so far, when they take `kept`."""
        taken = torch.cuda.max_memory_allocated(self._device) - self._before - kept
        self._computing = max(self._computing, taken)
        return self.beside(self._computing)


class Intermediates:
    """Values by batch and name. Tensors are stored on `storage` and handed out on `device`.

    With `room`, what has room there stays on `device` all the same.
    """

    def __init__(self, device: torch.device, storage: torch.device, *, room: Room | None = None) -> None:
        self._away = transfers_between(device, storage)
        self._here = Direct(device, device)
        self._room = room
        self._kept = 0
        """Bytes that stay on the device although they could be moved away."""
        self._batches: list[dict[str, Any]] = []
        self._coming: dict[tuple[int, str], Any] = {}

    @staticmethod
    def for_offload(offload: str, device: torch.device) -> Intermediates:
        """The store for a setting of `offload`."""
        storage = storage_device(offload, device)
        room = Room(device) if offload == AUTO and device.type == "cuda" else None
        return Intermediates(device, storage, room=room)

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, values: Mapping[str, Any], *, shared: Collection[str] = ()) -> None:
        """Store the inputs of one more batch; of those in `shared` a copy, as the batch is the caller's."""
        copied = copy.deepcopy({name: values[name] for name in shared if name in values})
        self._batches.append({})
        self.store(len(self._batches) - 1, {**values, **copied}, shared=shared)

    def expect(self, nbytes: int) -> None:
        """Make ready for so many bytes of values, beside the inputs."""
        self._away.expect(nbytes - (0 if self._room is None else self._room.now(self._kept)))

    def store(self, batch: int, values: Mapping[str, Any], *, shared: Collection[str] = ()) -> None:
        """Store values of batch number `batch`.

        Those in `shared` are written to in place while other values may be views of them: they stay where they are.
        """
        for name, value in values.items():
            self.free(batch, [name])
            self._batches[batch][name] = self._parked(value, name in shared)

    def prefetch(self, batch: int, names: Iterable[str]) -> None:
        """Begin to bring values of batch number `batch` to the device that computes; `load` will ask for them."""
        for name in names:
            if (batch, name) not in self._coming:
                self._coming[batch, name] = _mapped(_Stored, _Stored.fetch, self._batches[batch][name])

    def load(self, batch: int, names: Iterable[str], *, private: Collection[str] = ()) -> dict[str, Any]:
        """Values of batch number `batch` on the device that computes; those in `private` as copies to write to."""
        names = list(names)
        self.prefetch(batch, names)
        loaded = {name: _mapped(_Coming, _Coming.arrive, self._coming.pop((batch, name))) for name in names}
        # one call for all of them: values that share memory still do in the copy
        return {**loaded, **copy.deepcopy({name: loaded[name] for name in private})}

    def free(self, batch: int, names: Iterable[str]) -> None:
        """Forget values of batch number `batch`."""
        for name in names:
            value = self._batches[batch].pop(name, None)
            self._coming.pop((batch, name), None)
            for stored in _leaves(value):
                stored.by.drop(stored.what)
                self._kept -= stored.kept

    def pace(self) -> None:
        """A batch has been queued on the device: wait if too many are."""
        self._away.pace()

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(s.what.nbytes for values in self._batches for v in values.values() for s in _leaves(v))

    def _parked(self, value: Any, stays: bool) -> Any:
        def park(tensor: torch.Tensor) -> _Stored:
            if stays:
                return _Stored(self._here.park(tensor), self._here)
            if self._room is not None and self._kept + tensor.nbytes <= self._room.now(self._kept):
                self._kept += tensor.nbytes
                return _Stored(self._here.park(tensor), self._here, tensor.nbytes)
            return _Stored(self._away.park(tensor), self._away)

        return _mapped(torch.Tensor, park, value)


class _Stored:
    """A stored tensor and who stores it."""

    __slots__ = ("by", "kept", "what")

    def __init__(self, what: Any, by: Transfers, kept: int = 0) -> None:
        self.what, self.by, self.kept = what, by, kept

    def fetch(self) -> _Coming:
        return _Coming(self.by.fetch(self.what), self.by)


class _Coming:
    """A tensor on its way."""

    __slots__ = ("by", "what")

    def __init__(self, what: Any, by: Transfers) -> None:
        self.what, self.by = what, by

    def arrive(self) -> torch.Tensor:
        return self.by.arrive(self.what)


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` of every `kind` in it, in tuples, lists and dicts too."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list, dict)):
        return pytree.tree_map_only(kind, function, value)
    return value


def _leaves(value: Any) -> list[_Stored]:
    if isinstance(value, _Stored):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, _Stored)]
