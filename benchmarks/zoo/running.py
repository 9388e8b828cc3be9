"""Each architecture in a process of its own: a crash, a hang or too much memory costs that one alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.zoo.architectures import Architecture
from benchmarks.zoo.errors import cause
from benchmarks.zoo.scoring import records
from benchmarks.zoo.tools import tool

Record = dict[str, Any]
Job = tuple[Architecture, str]
"""What is scored, and the name of the tool."""

TIMEOUT = 240.0
ADDRESS_SPACE = 14 * 2**30


def address_space() -> int | None:
    """Bytes of address space that one process may take; None with builds of torch for accelerators, which map far more
    than they use."""
    return None if torch.version.cuda or torch.version.hip else ADDRESS_SPACE


def run_all(
    jobs: Sequence[Job], at_once: int = 1, timeout: float = TIMEOUT, score: Callable[..., Iterator[Record]] = records
) -> Iterator[Record]:
    """Score all `jobs`, `at_once` of them side by side; yields their records as they end.

    `timeout` is in seconds for each. A record has `crash` where its process ended before it was done.
    """
    waiting, running = list(reversed(jobs)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Running.start(waiting.pop(), timeout, score))
            soonest = min(job.deadline for job in running)
            wait([job.connection for job in running], timeout=max(0.0, soonest - time.monotonic()))
            for job in list(running):
                if job.ended():
                    running.remove(job)
                    yield job.result()
    finally:
        for job in running:
            job.process.kill()


@dataclass(eq=False)
class _Running:
    job: Job
    process: BaseProcess
    connection: Connection
    started: float
    deadline: float
    record: Record = field(default_factory=dict)
    timed_out: bool = False

    @classmethod
    def start(cls, job: Job, timeout: float, score: Callable[..., Iterator[Record]]) -> _Running:
        context = multiprocessing.get_context("fork")  # torch and transformers are imported once
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_score, args=(job, sending, score), daemon=True)
        process.start()
        sending.close()
        now = time.monotonic()
        return cls(job, process, receiving, now, now + timeout)

    def ended(self) -> bool:
        """Take in what has arrived; whether nothing more will."""
        try:
            while self.connection.poll():
                self.record = self.connection.recv()
        except EOFError:
            self.process.join()
            return True
        self.timed_out = time.monotonic() >= self.deadline
        if self.timed_out:
            self.process.kill()
            self.process.join()
        return self.timed_out

    def result(self) -> Record:
        architecture, name = self.job
        record = {"name": architecture.name, "category": architecture.category, "built": False, **self.record}
        record.update(tool=name, seconds=round(time.monotonic() - self.started, 1))
        if not record.pop("complete", False) and "stage" not in record:
            code = self.process.exitcode or 0
            died = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            record["crash"] = f"took more than {self.deadline - self.started:.0f} s" if self.timed_out else died
        self.connection.close()
        return record


def _score(job: Job, connection: Connection, score: Callable[..., Iterator[Record]]) -> None:
    architecture, name = job
    limit = address_space()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    record: Record = {}
    try:
        for record in score(architecture, tool(name)):
            connection.send(record)
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send({**record, "error": cause(error)})
        raise
