"""What the walk itself costs: a sequential calibration with a modifier that does nothing, against plain forwards.

Two plain forwards of every batch are the least that a sequential calibration can take. `gptq` follows, so that one
command gives all numbers of a machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks import gptq
from benchmarks.environment import environment, idle_warning, pin_threads
from benchmarks.models import smollm2
from benchmarks.results import FOLDER, markdown, save
from benchmarks.texts import news
from fxcalib.data import Batch, batches, build
from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope

REPEATS = 3


class IdleModifier(Modifier):
    """Observes every `nn.Linear` with an empty hook and claims to change it, so that no pass is left out."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(observed=self._names, committed=self._names)

    def attach(self, model: nn.Module) -> None:
        self._names = frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear))

    def observe(self, scope: Scope) -> AbstractContextManager[None]:
        return self._hooks([module for name, module in scope.modules.items() if name in self._names])

    def commit(self, scope: Scope) -> list[ModuleResult]:
        return []

    def detach(self, model: nn.Module) -> None:
        self._names = frozenset()

    @contextmanager
    def _hooks(self, modules: list[nn.Module]) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(lambda module, inputs: None) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark: those of `gptq` and its own."""
    gptq.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"interleaved repeats (default: {REPEATS})")
    parser.add_argument("--no-gptq", action="store_true", help="leave out the comparison of GPTQ")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and save the result."""
    pin_threads(arguments.threads)
    warning = idle_warning()
    if warning:
        print(warning, file=sys.stderr)
    size = gptq.QUICK if arguments.quick else gptq.Size()
    result: dict[str, object] = {"environment": environment(arguments.threads), "size": vars(size)}
    walk = measure(smollm2(), size, arguments.repeats)
    result["walk"] = walk
    print(table(walk), flush=True)
    if not arguments.no_gptq:
        compared = gptq.compare(size, arguments.threads, arguments.tools)
        result["gptq"] = compared["rows"]
        print("\n" + gptq.table(compared))
    output: Path | None = arguments.output or (None if arguments.quick else FOLDER / "overhead.json")
    if output:
        save(output, result)


def measure(folder: Path, size: gptq.Size, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, tracing included: `calibration`, `two_forwards`, and `same_work`.

    The last subgraph, with the language model head, is never propagated; `same_work` is therefore one plain forward
    and one without the head, the harder comparison.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fxcalib import calibrate

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    texts = build(news(), AutoTokenizer.from_pretrained(folder), samples=size.samples, seq_len=size.seq_len)
    data = batches(texts, size.batch_size)
    seconds: dict[str, list[float]] = {"calibration": [], "two_forwards": [], "same_work": []}
    _forward(model, data[:2])  # first calls set up threads, buffers and kernels
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats} ...", file=sys.stderr)
        whole = _forward(model, data)
        headless = _forward(model.model, data)
        started = time.perf_counter()
        calibrate(model, data, [IdleModifier()])
        seconds["calibration"].append(time.perf_counter() - started)
        again = _forward(model, data)
        seconds["two_forwards"].append(whole + again)
        seconds["same_work"].append((whole + again) / 2 + headless)
    return seconds


def table(walk: dict[str, list[float]]) -> str:
    """The times of `measure` as Markdown: best and median, and the ratio of the calibration's to each."""
    names = {
        "calibration": "sequential calibration that does nothing",
        "two_forwards": "two plain forwards",
        "same_work": "the same, head only once",
    }
    best = {name: min(walk[name]) for name in names}
    median = {name: statistics.median(walk[name]) for name in names}
    rows = [
        {
            "what": line,
            "best, s": best[name],
            "median, s": median[name],
            "ratio of best": best["calibration"] / best[name],
            "ratio of medians": median["calibration"] / median[name],
        }
        for name, line in names.items()
    ]
    return markdown(rows)


def _forward(model: nn.Module, data: list[Batch]) -> float:
    """Seconds of one plain forward of every batch."""
    with torch.inference_mode():
        started = time.perf_counter()
        for batch in data:
            model(**batch, use_cache=False)
        return time.perf_counter() - started
