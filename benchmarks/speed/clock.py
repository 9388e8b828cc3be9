"""Seconds of work on a device, and the fastest of several ways to do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, from an idle device to an idle device."""
    _finish(device)
    began = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - began


def fastest(candidates: Sequence[int], work: Callable[[int], object], device: torch.device) -> int:
    """The number of samples, one of powers of two, with which `work(number)` takes least time for the same samples."""

    def same_samples(candidate: int) -> float:
        work(candidate)
        return seconds(lambda: [work(candidate) for _ in range(max(candidates) // candidate)], device)

    return min(candidates, key=same_samples)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
