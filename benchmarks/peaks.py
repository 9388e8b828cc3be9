"""Predicted against measured peaks of memory, on random Llama-shaped models of different shapes.

Each case runs in a process of its own. Host peaks are those of the resident set beyond what the process holds when
idle, after a small model went through the same work. glibc's allocator keeps freed memory below its dynamic threshold
in fragments, up to a few hundred MiB that no tensor uses and that differ from run to run; the processes measured here
hand freed memory back at once (MALLOC_MMAP_THRESHOLD_), so that what is measured is what is held. `--allocator default`
leaves the allocator as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, pin_threads, thread_variables
from benchmarks.peaks_run import MODIFIERS, save_random
from benchmarks.results import FOLDER, markdown, save

SHAPES: dict[str, dict[str, object]] = {
    "deep and narrow": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "shallow and wide": {
        "vocab_size": 4096,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "large vocabulary": {
        "vocab_size": 64000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
"""Row -> sizes: 164, 216 and 235 MiB in bfloat16."""

BATCHES, BATCH_SIZE, SEQ_LEN = 4, 4, 256
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="one model, one algorithm; saves no result")
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--allocator", choices=["exact", "default"], default="exact", help="of host memory")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/peaks.json)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and save the result."""
    pin_threads(arguments.threads)
    shapes = list(SHAPES)[: 1 if arguments.quick else None]
    modifiers = list(MODIFIERS)[: 1 if arguments.quick else None]
    rows = []
    for shape in shapes:
        for modifier in modifiers:
            print(f"running {modifier} on {shape} ...", file=sys.stderr)
            rows += compare(shape, modifier, arguments.device, arguments.threads, arguments.allocator)
    print(markdown(rows))
    output: Path | None = arguments.output or (None if arguments.quick else FOLDER / "peaks.json")
    if output:
        save(output, {"environment": environment(arguments.threads), "allocator": arguments.allocator, "rows": rows})


def compare(shape: str, modifier: str, device: str, threads: int, allocator: str) -> list[dict[str, object]]:
    """Rows of predicted and measured MiB: host, and device where it is an accelerator.

    Raises RuntimeError with the last lines of a run that failed.
    """
    from fxcalib.api import plan

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_random(SHAPES[shape], folder)
        predicted = plan(
            folder,
            modifiers=MODIFIERS[modifier](),
            samples=BATCHES * BATCH_SIZE,
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            device=device,
        )
        job = {
            "model": str(folder),
            "vocabulary": SHAPES[shape]["vocab_size"],
            "batches": BATCHES,
            "batch_size": BATCH_SIZE,
            "seq_len": SEQ_LEN,
            "modifier": modifier,
            "device": device,
        }
        measured = _measure(job, threads, allocator)
    peaks = {"host": max(measured["host"].values()), "device": max(measured["device"].values())}
    rows: list[dict[str, object]] = []
    for tier in ("host", "device"):
        moment = predicted.peak(tier)
        expected = moment.host_bytes if tier == "host" else moment.device_bytes
        if expected:
            rows.append(
                {
                    "model": shape,
                    "modifier": modifier,
                    "tier": tier,
                    "predicted, MiB": expected / 2**20,
                    "measured, MiB": peaks[tier] / 2**20,
                    "off by, %": 100 * (expected / peaks[tier] - 1),
                    "at": moment.name,
                }
            )
    return rows


def _measure(job: dict[str, Any], threads: int, allocator: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.peaks_run", json.dumps(job)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, **thread_variables(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    variables |= RETURNED_AT_ONCE if allocator == "exact" else {}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("the run failed:\n" + "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured
