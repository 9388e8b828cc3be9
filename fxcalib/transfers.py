"""Where tensors lie while nothing computes with them, and how they come and go behind the computation."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AHEAD = 2
"""Batches that may be queued on the device before the host waits: enough to hide copies, few enough to bound memory."""


class Transfers(ABC):
    """Parks tensors away from where they are computed and fetches them back."""

    @abstractmethod
    def park(self, tensor: Tensor) -> Any:
        """Put a tensor away; returns what stands for it."""

    @abstractmethod
    def fetch(self, parked: Any) -> Any:
        """Begin to bring it back; returns what stands for the tensor on its way."""

    @abstractmethod
    def arrive(self, fetched: Any) -> Tensor:
        """The tensor, for use by what is computed next."""

    @abstractmethod
    def expect(self, nbytes: int) -> None:
        """Make ready for so many bytes to be parked."""

    @abstractmethod
    def drop(self, parked: Any) -> None:
        """What is parked there is not needed again."""

    @abstractmethod
    def pace(self) -> None:
        """A batch has been queued: wait until the device is at most `AHEAD` batches behind."""


class Direct(Transfers):
    """Plain copies that the computation waits for; none where the tensor is on the right device already."""

    def __init__(self, device: torch.device, storage: torch.device) -> None:
        self._device, self._storage = device, storage

    def park(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._storage)

    def fetch(self, parked: Tensor) -> Tensor:
        return parked

    def arrive(self, fetched: Tensor) -> Tensor:
        return fetched.to(self._device)

    def expect(self, nbytes: int) -> None:
        pass

    def drop(self, parked: Tensor) -> None:
        pass

    def pace(self) -> None:
        pass


@dataclass(eq=False)
class Parked:
    """A tensor in page-locked host memory."""

    host: Tensor
    buffer: Tensor
    """The bytes that `host` is a view of."""
    settled: torch.cuda.Event
    """The last copy from or to it has ended."""

    @property
    def nbytes(self) -> int:
        return self.host.nbytes


@dataclass(eq=False)
class Fetched:
    """A tensor on its way to the device."""

    tensor: Tensor
    arrived: torch.cuda.Event


class Overlapped(Transfers):
    """Copies between a CUDA device and page-locked host memory on streams of their own.

    Buffers are used again for tensors of the same size. What was parked is a copy: later changes of the tensor in place
    do not reach it. A tensor that lies on the host already is kept as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._memory = _PageLocked()
        self._free: dict[int, list[tuple[Tensor, torch.cuda.Event]]] = defaultdict(list)
        self._queued: deque[torch.cuda.Event] = deque()

    def park(self, tensor: Tensor) -> Tensor | Parked:
        if not tensor.is_cuda:
            return tensor
        parked = self._room(tensor.detach())
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            parked.host.copy_(tensor.detach(), non_blocking=True)
            parked.settled.record()
        tensor.record_stream(self._out)
        return parked

    def fetch(self, parked: Tensor | Parked) -> Tensor | Fetched:
        if isinstance(parked, Tensor):
            return parked
        with torch.cuda.stream(self._in):
            self._in.wait_event(parked.settled)
            tensor = torch.empty_strided(
                parked.host.shape, parked.host.stride(), dtype=parked.host.dtype, device=self._device
            )
            tensor.copy_(parked.host, non_blocking=True)
            parked.settled.record()
            return Fetched(tensor, parked.settled)

    def arrive(self, fetched: Tensor | Fetched) -> Tensor:
        if isinstance(fetched, Tensor):
            return fetched.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(fetched.arrived)
        fetched.tensor.record_stream(computing)
        return fetched.tensor

    def expect(self, nbytes: int) -> None:
        self._memory.prepare(nbytes)

    def drop(self, parked: Tensor | Parked) -> None:
        if isinstance(parked, Parked):
            self._free[parked.buffer.nbytes].append((parked.buffer, parked.settled))

    def pace(self) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._queued.append(event)
        if len(self._queued) > AHEAD:
            self._queued.popleft().synchronize()

    def _room(self, tensor: Tensor) -> Parked:
        """Host memory laid out like `tensor`."""
        free = self._free[tensor.nbytes]
        if free:
            buffer, settled = free.pop()
            self._out.wait_event(settled)
        else:
            buffer, settled = self._memory.take(tensor.nbytes), torch.cuda.Event()
        layout = torch.empty_like(tensor, device="meta")  # dense strides are kept, others become contiguous
        host = buffer.view(tensor.dtype).as_strided(layout.shape, layout.stride())
        return Parked(host, buffer, settled)


_FIRST_SLAB, _LARGEST_SLAB = 16 << 20, 256 << 20
_ALIGNMENT = 512


class _PageLocked:
    """Host memory that a CUDA device copies to and from by itself, in slabs that are cut up.

    Its pages are touched by all cores and then locked, which is several times faster than to allocate them locked, and
    nothing is rounded up to a power of two. Where the system refuses to lock more, copies are slower and still right.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._locked: list[Tensor] = []
        self._next = _FIRST_SLAB
        self._coming: deque[Future[Tensor]] = deque()
        weakref.finalize(self, _unlock_behind, self._locked).atexit = False

    def prepare(self, nbytes: int) -> None:
        """Begin to lock so much memory in a thread."""
        # one thread: several hold up whoever launches kernels more than they gain
        thread = ThreadPoolExecutor(1, thread_name_prefix="fxcalib-memory")
        while nbytes > 0:
            self._coming.append(thread.submit(_lock, min(nbytes, _LARGEST_SLAB), self._locked))
            nbytes -= _LARGEST_SLAB
        thread.shutdown(wait=False)

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8, never given out again."""
        if self._used + nbytes > self._slab.numel():
            self._slab, self._used = self._new_slab(nbytes), 0
        taken = self._slab[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return taken

    def _new_slab(self, nbytes: int) -> Tensor:
        while self._coming:
            slab = self._coming.popleft().result()
            if slab.numel() >= nbytes:
                return slab
        size, self._next = max(nbytes, self._next), min(2 * self._next, _LARGEST_SLAB)
        return _lock(size, self._locked)


def _lock(nbytes: int, locked: list[Tensor]) -> Tensor:
    """Fresh memory in huge pages where there are; a slab that could be locked is added to `locked`."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(memory, dtype=torch.uint8).fill_(0)
    if int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)) == 0:
        locked.append(slab)
    return slab


def _unlock_behind(slabs: list[Tensor]) -> None:
    """Give memory back in a thread, once the device is done with it."""
    threading.Thread(target=_unlock, args=(slabs,), name="fxcalib-memory").start()


def _unlock(slabs: list[Tensor]) -> None:
    torch.cuda.synchronize()
    while slabs:
        slab = slabs.pop()
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
        _give_back(slab)


def _give_back(slab: Tensor) -> None:
    """Let the system have the pages of a slab that is not needed any more.

    It takes the system long, and Python's own way, at the end of the object, keeps all threads waiting meanwhile.
    """
    advise, dont_need = getattr(ctypes.CDLL(None), "madvise", None), getattr(mmap, "MADV_DONTNEED", None)
    if advise is not None and dont_need is not None:
        advise(ctypes.c_void_p(slab.data_ptr()), ctypes.c_size_t(slab.nbytes), dont_need)


def transfers_between(device: torch.device, storage: torch.device) -> Transfers:
    """How tensors travel between the device that computes and the one that stores."""
    if device.type == "cuda" and storage.type == "cpu":
        return Overlapped(device)
    return Direct(device, storage)
