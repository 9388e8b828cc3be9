"""GPTQ W4A16 group 64 symmetric on SmolLM2-135M: wall time, peak memory and quality, beside llm-compressor.

Each tool gets the same token windows of news and runs in a process of its own, one after the other, with the same
number of threads. Quality is measured in the same process after time and memory, on windows of Wikipedia text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.environment import environment, idle_warning, pin_threads, thread_variables, usable_cores
from benchmarks.models import smollm2
from benchmarks.results import FOLDER, markdown, save
from benchmarks.texts import news, wikipedia
from fxcalib.data import build


@dataclass(frozen=True)
class Size:
    """How much is measured. Calibration and evaluation windows have `seq_len` tokens each."""

    samples: int = 64
    windows: int = 32
    seq_len: int = 512
    batch_size: int = 1


QUICK = Size(samples=4, windows=2, seq_len=256)

TOOLS = {
    "fxcalib": ("fxcalib", None),
    "llm-compressor (min-max scales, its default)": ("llmcompressor", "minmax"),
    "llm-compressor (MSE scales)": ("llmcompressor", "mse"),
}
"""Row of the table -> tool and observer of the weights; None is the tool's own default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="a small version to see that it runs; saves no result")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    parser.add_argument("--tools", nargs="+", choices=["fxcalib", "llmcompressor"], help="only these")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/gptq.json)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and save the result."""
    pin_threads(arguments.threads)
    warning = idle_warning()
    if warning:
        print(warning, file=sys.stderr)
    result = compare(QUICK if arguments.quick else Size(), arguments.threads, arguments.tools)
    print(table(result))
    output = arguments.output or (None if arguments.quick else FOLDER / "gptq.json")
    if output:
        save(output, result)


def compare(size: Size, threads: int, tools: list[str] | None = None) -> dict[str, object]:
    """Measure each tool in turn: `{"environment", "size", "rows"}`, plain JSON values.

    Raises RuntimeError with the last lines of a tool that failed.
    """
    around = environment(threads)
    model = smollm2()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "windows.safetensors"
        _save_windows(model, size, data)
        for row, (tool, observer) in TOOLS.items():
            if tools is None or tool in tools:
                print(f"running {row} ...", file=sys.stderr)
                measured = _measure(tool, observer, model, data, size.batch_size, threads, Path(folder))
                rows.append({"tool": row, **measured})
    return {"environment": around, "size": vars(size), "rows": rows}


def table(result: dict[str, object]) -> str:
    """The rows of `compare` as Markdown."""
    rows = result["rows"]
    assert isinstance(rows, list)
    shown = [
        {
            "tool": row["tool"],
            "GPTQ, s": row["seconds"],
            "peak memory, GiB": row["peak_bytes"] / 2**30,
            "before GPTQ, GiB": row["before_bytes"] / 2**30,
            "perplexity": row["perplexity"],
            "original": row["reference_perplexity"],
            "KL, nats": row["kl"],
        }
        for row in rows
    ]
    return markdown(shown)


def _save_windows(model: Path, size: Size, path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = build(news(), tokenizer, samples=size.samples, seq_len=size.seq_len)
    heldout = build(wikipedia(), tokenizer, samples=size.windows, seq_len=size.seq_len)
    save_file({"calibration": torch.stack(calibration.samples), "heldout": torch.stack(heldout.samples)}, path)


def _measure(
    tool: str, observer: str | None, model: Path, data: Path, batch_size: int, threads: int, folder: Path
) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.gptq_run", tool, str(model), str(data), str(batch_size)]
    # In `folder`, since llm-compressor leaves log files where it runs; the root of the repository is on the path.
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, **thread_variables(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *([observer] if observer else [])], cwd=folder, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n" + "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    measured: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured
