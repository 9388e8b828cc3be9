"""Where the time of a run goes: every moment belongs to one kind of work, so that the parts add up to the whole.

On a CUDA device the moments are those of the stream that computes, told by events in it: nothing waits for them, and
what is hidden behind computing is not counted.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Profile:
    """Seconds by kind of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._kind = "other"
        self._seconds: dict[str, float] = defaultdict(float)
        self._marks: deque[tuple[str, Any]] = deque()
        """When each kind began: seconds, or an event on the device."""
        self._mark()

    def enter(self, kind: str) -> str:
        """From now on it is `kind` that takes the time; returns what it was before."""
        before, self._kind = self._kind, kind
        self._mark()
        return before

    def seconds(self) -> dict[str, float]:
        """Seconds of every kind that took any, up to now; waits for the device."""
        self._mark()
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        self._fold(len(self._marks))
        return dict(self._seconds)

    def _mark(self) -> None:
        if self._device is None:
            self._marks.append((self._kind, time.perf_counter()))
            self._fold(len(self._marks))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((self._kind, event))
        if len(self._marks) > 1 and self._marks[1][1].query():
            self._fold(2)

    def _fold(self, count: int) -> None:
        """Add up what lies between the first `count` marks."""
        for _ in range(count - 1):
            kind, begin = self._marks.popleft()
            _, end = self._marks[0]
            self._seconds[kind] += end - begin if self._device is None else begin.elapsed_time(end) / 1000


_current: ContextVar[Profile | None] = ContextVar("fxcalib_profile", default=None)


@contextmanager
def profiling(profile: Profile | None) -> Iterator[None]:
    """Let `span` count towards `profile` in here."""
    token = _current.set(profile)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def span(kind: str) -> Iterator[None]:
    """What is done in here is `kind`, a name in `fxcalib.report.WORK`; costs nothing while there is no profile."""
    profile = _current.get()
    if profile is None:
        yield
        return
    before = profile.enter(kind)
    try:
        yield
    finally:
        profile.enter(before)
