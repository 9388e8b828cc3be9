"""How a run is drawn on a terminal: a live view where there is one, plain lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fxcalib.progress import Progress
from fxcalib.report import format_seconds

if TYPE_CHECKING:
    from fxcalib.modifiers.base import ModuleResult

SHOWN_MODULES = 6
PLAIN_INTERVAL_SECONDS = 10.0


class Pace:
    """How far a schedule has got, and when it will end: work is counted in batches over all passes."""

    def __init__(self) -> None:
        self.phase = ""
        self.subgraphs = self.passes = self.batches = 0
        self.subgraph = 0
        self.kind = ""
        self.pass_batches = self.pass_done = 0
        self.passes_begun = 0
        self.tokens = 0
        self._before = 0
        self._started: float | None = None
        self._now = 0.0

    def plan(self, subgraphs: int, passes: int, batches: int) -> None:
        self.subgraphs, self.passes, self.batches = subgraphs, passes, batches
        self.passes_begun = self.pass_done = self.pass_batches = self._before = self.tokens = 0
        self._started = None

    def sweep(self, subgraph: int, kind: str, batches: int, now: float) -> None:
        if self._started is None:
            self._started = now
        self._before += self.pass_done
        self.subgraph, self.kind = subgraph, kind
        self.pass_batches, self.pass_done = batches, 0
        self.passes_begun += 1
        self._now = now

    def batch(self, tokens: int, now: float) -> None:
        self.pass_done += 1
        self.tokens += tokens
        self._now = now

    @property
    def done(self) -> int:
        """Batches that were run, over all passes."""
        return self._before + self.pass_done

    @property
    def total(self) -> int:
        """Batches that will have been run at the end, over all passes."""
        return self.passes * self.batches

    @property
    def tokens_per_second(self) -> float:
        """Tokens through a subgraph per second, commits included."""
        elapsed = self._now - self._started if self._started is not None else 0.0
        return self.tokens / elapsed if elapsed > 0 else 0.0

    def remaining_seconds(self, now: float) -> float | None:
        """Time that the rest of the passes will take at the pace so far; None before the first batch."""
        if self._started is None or not self.done:
            return None
        return max(0.0, (now - self._started) * (self.total - self.done) / self.done)


class RichProgress(Progress):
    """Draws a run on standard error: live on a terminal, a line now and then elsewhere, nothing where `quiet`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.pace = Pace()
        self._quiet = quiet
        self._recent: deque[ModuleResult] = deque(maxlen=SHOWN_MODULES)
        self._worst: ModuleResult | None = None
        """Of the subgraph that is running: the module with the largest error so far."""
        self._live: Live | None = None
        self._next_line = 0.0

    def phase(self, name: str) -> None:
        self.pace.phase = name
        if self._quiet:
            return
        if not self.console.is_terminal:
            self._line(name)
        elif self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                transient=True,
                redirect_stdout=False,
                refresh_per_second=8,
            )
            self._live.start()

    def plan(self, subgraphs: int, passes: int, batches: int) -> None:
        self.pace.plan(subgraphs, passes, batches)
        self._recent.clear()
        self._line(f"{subgraphs} subgraphs, {passes} passes over {batches} batches")

    def sweep(self, subgraph: int, kind: str, batches: int) -> None:
        now = time.monotonic()
        if kind == "evaluate":  # a schedule of its own, of one pass
            self.pace.plan(1, 1, batches)
        self.pace.sweep(subgraph, kind, batches, now)
        if now >= self._next_line:
            self._next_line = now + PLAIN_INTERVAL_SECONDS
            self._line(self._headline(now))

    def batch(self, tokens: int) -> None:
        now = time.monotonic()
        self.pace.batch(tokens, now)
        if now >= self._next_line:
            self._next_line = now + PLAIN_INTERVAL_SECONDS
            self._line(self._headline(now))

    def module(self, result: ModuleResult) -> None:
        self._recent.append(result)
        if result.error is not None and (self._worst is None or _error(result) > _error(self._worst)):
            self._worst = result
        if result.notes:
            self._line(f"{result.name}: {'; '.join(result.notes)}")

    def subgraph(self, subgraph: int, seconds: float) -> None:
        worst, self._worst = self._worst, None
        remaining = self.pace.remaining_seconds(time.monotonic())
        parts = [f"subgraph {subgraph + 1} of {self.pace.subgraphs} done in {format_seconds(seconds)}"]
        if worst is not None:
            parts.append(f"largest error {_error(worst):.2e} of {worst.measure} in {worst.name}")
        if remaining is not None:
            parts.append(f"{format_seconds(remaining)} left")
        self._line(", ".join(parts))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, text: str) -> None:
        """One line for a log; a terminal shows the same in its live view."""
        if not self._quiet and not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _headline(self, now: float) -> str:
        pace = self.pace
        remaining = pace.remaining_seconds(now)
        eta = "" if remaining is None else f", {format_seconds(remaining)} left"
        rate = f", {pace.tokens_per_second:,.0f} tokens/s" if pace.tokens_per_second else ""
        where = "" if pace.kind == "evaluate" else f"subgraph {pace.subgraph + 1} of {pace.subgraphs}, "
        return f"{where}{pace.kind}, batch {pace.pass_done} of {pace.pass_batches}{rate}{eta}"

    def _render(self) -> RenderableType:
        pace = self.pace
        parts: list[RenderableType] = [Text(pace.phase, style="bold")]
        if pace.passes_begun and pace.done < pace.total:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(total=max(pace.total, 1), completed=pace.done, width=40), f"{pace.done}/{pace.total}"
            )
            parts += [Text(self._headline(time.monotonic())), bar]
        if self._recent:
            table = Table.grid(padding=(0, 2))
            for result in self._recent:
                error = "" if result.error is None else f"{result.error:.2e} of {result.measure}"
                table.add_row(
                    Text(result.name, style="dim"), Text(error), Text("; ".join(result.notes), style="yellow")
                )
            parts.append(table)
        return Group(*parts)


def _error(result: ModuleResult) -> float:
    """For comparison: NaN is the largest."""
    return math.inf if result.error is None or math.isnan(result.error) else result.error


def stderr_console() -> Console:
    """Where messages for people go, so that standard output stays for results."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())
