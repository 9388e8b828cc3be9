"""Residency of parameters: a subgraph's weights lie on the device that computes only while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

_STAGED = 32 << 20
"""Bytes of a page-locked buffer."""


@dataclass(eq=False)
class _Visit:
    """Modules on the device that computes."""

    modules: Sequence[nn.Module]
    homes: Mapping[int, Tensor]
    """Tensor that had to be brought, by its id -> what it was at home."""
    copies: Future[None]


def all_on(model: nn.Module, device: torch.device) -> bool:
    """Whether all parameters and buffers lie on `device`."""
    return all(_same(tensor.device, device) for tensor in _tensors([model]))


class Residency:
    """Moves modules to the device that computes and back to where they were.

    On a CUDA device both happen behind the computation, in a thread and on a stream of their own: `load` and `unload`
    only ask for it, `wait` makes sure. Parameters and buffers stay the objects that they are, and return to the memory
    that they came from, which nothing else may share.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._visits: dict[int, _Visit] = {}
        self._away: dict[int, tuple[Tensor, Tensor]] = {}
        """What is not at home, or not yet again: by its id, with what it was at home."""
        self._wanted: Counter[int] = Counter()
        """Tensor, by its id -> visits that need it."""
        self._leaving: list[Future[None]] = []
        self._lane = _Lane(device) if device.type == "cuda" else _Inline(device)
        self._shared = _sharing(_tensors([model])) if device.type == "cuda" else set()

    def load(self, key: int, modules: Sequence[nn.Module]) -> None:
        """Begin to bring parameters and buffers of `modules` to the device, as visit number `key`."""
        coming: list[tuple[Tensor, Tensor]] = []
        for tensor in _tensors(modules):
            _, home = self._away.get(id(tensor), (tensor, tensor.data))
            if not _same(home.device, self._device):
                coming.append((tensor, home))
                self._away[id(tensor)] = tensor, home
        self._wanted.update(id(tensor) for tensor, _ in coming)

        def bring() -> None:
            for tensor, _ in coming:
                if not _same(tensor.device, self._device):
                    tensor.data = self._lane.bring(tensor.data)

        homes = {id(tensor): home for tensor, home in coming}
        self._visits[key] = _Visit(modules, homes, self._lane.submit(bring))

    def wait(self, key: int) -> None:
        """Do not go on before the weights of visit `key` are there."""
        if key in self._visits:
            self._visits[key].copies.result()

    def unload(self, key: int) -> None:
        """Begin to bring them back, with what was added to them in the meantime."""
        visit = self._visits.pop(key, None)
        if visit is None or not visit.homes:
            return
        visit.copies.result()
        self._wanted.subtract(list(visit.homes))
        anywhere = torch.empty(0, device=next(iter(visit.homes.values())).device)
        there = [t for t in _tensors(visit.modules) if _same(t.device, self._device) and not self._wanted[id(t)]]
        going = [(tensor, visit.homes.get(id(tensor), anywhere)) for tensor in there]
        self._away.update({id(tensor): (tensor, home) for tensor, home in going})
        done = [key for key in {*visit.homes, *(id(tensor) for tensor in there)} if not self._wanted[key]]

        def back() -> None:
            for tensor, home in going:
                fits = home.shape == tensor.shape and home.dtype == tensor.dtype and id(tensor) not in self._shared
                tensor.data = self._lane.back(
                    tensor.data, home if fits else torch.empty_like(tensor, device=home.device)
                )
            for key in done:
                if not self._wanted[key]:
                    self._away.pop(key, None)

        self._leaving = [each for each in self._leaving if not each.done()]
        self._leaving.append(self._lane.submit(back))

    def unload_all(self) -> None:
        """Bring back whatever is still away, and wait until all of it is there."""
        for key in list(self._visits):
            self.unload(key)
        for each in self._leaving:
            each.result()
        self._lane.close()


class _Inline:
    """Work that is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        work()
        done.set_result(None)
        return done

    def bring(self, home: Tensor) -> Tensor:
        """A copy of `home` on the device."""
        return home.to(self._device)

    def back(self, tensor: Tensor, home: Tensor) -> Tensor:
        """Copy `tensor` from the device to `home`, and return that."""
        return home.copy_(tensor)

    def close(self) -> None:
        pass


class _Lane(_Inline):
    """A thread that does one piece of work after the other on a stream of its own, behind what is computed so far.

    Copies go through two page-locked buffers: copying to and from other memory would hold up the driver, and with it
    whoever launches kernels meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream, self._computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fxcalib-weights")
        self._buffers: list[Tensor] = []

    def submit(self, work: Callable[[], None]) -> Future[None]:
        computed = torch.cuda.Event()
        computed.record(self._computing)

        def run() -> None:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._stream.wait_event(computed)
                work()
                self._stream.synchronize()

        return self._thread.submit(run)

    def bring(self, home: Tensor) -> Tensor:
        if home.device.type != "cpu" or not home.is_contiguous():
            arrived = home.to(self._device)
        else:
            arrived = torch.empty_like(home, device=self._device)
            events = [torch.cuda.Event(), torch.cuda.Event()]
            for index, (source, target) in enumerate(self._pieces(home, arrived)):
                events[index % 2].synchronize()
                staged = self._buffer(index)[: len(source)]
                target.copy_(staged.copy_(source), non_blocking=True)
                events[index % 2].record()
            self._stream.synchronize()  # the buffers are free again
        arrived.record_stream(self._computing)
        return arrived

    def back(self, tensor: Tensor, home: Tensor) -> Tensor:
        if home.device.type != "cpu" or not (home.is_contiguous() and tensor.is_contiguous()):
            return home.copy_(tensor)
        waiting: tuple[torch.cuda.Event, Tensor, Tensor] | None = None
        for index, (source, target) in enumerate(self._pieces(tensor, home)):
            staged, event = self._buffer(index)[: len(source)], torch.cuda.Event()
            staged.copy_(source, non_blocking=True)
            event.record()
            self._settle(waiting)
            waiting = event, staged, target
        self._settle(waiting)
        return home

    def close(self) -> None:
        self._thread.shutdown()
        self._buffers.clear()

    @staticmethod
    def _settle(waiting: tuple[torch.cuda.Event, Tensor, Tensor] | None) -> None:
        if waiting is not None:
            event, staged, target = waiting
            event.synchronize()
            target.copy_(staged)

    @staticmethod
    def _pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both as bytes, in parts that fit a buffer."""
        if not source.numel():
            return iter(())
        first, second = (torch.split(tensor.view(-1).view(torch.uint8), _STAGED) for tensor in (source, target))
        return zip(first, second, strict=True)

    def _buffer(self, index: int) -> Tensor:
        if not self._buffers:
            self._buffers = [torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        return self._buffers[index % 2]


def _sharing(tensors: Sequence[Tensor]) -> set[int]:
    """Those that lie in memory of which another has a part, by their id."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _span(t), id(t)) for t in tensors if t.numel() and not t.is_meta)
    shared: set[int] = set()
    end, last = 0, 0
    for start, stop, key in spans:
        if start < end:
            shared |= {last, key}
        if stop > end:
            end, last = stop, key
    return shared


def _span(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of `modules`, each once."""
    found = (t for module in modules for t in chain(module.parameters(), module.buffers()))
    return list({id(t): t for t in found}.values())


def _same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.type == "cpu" or (a.index or 0) == (b.index or 0))
