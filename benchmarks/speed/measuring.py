"""One measurement: its data are written to a file, and `benchmarks.speed.worker` runs in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.environment import thread_variables
from benchmarks.models import smollm2
from benchmarks.speed.settings import Setting
from benchmarks.speed.works import Work
from benchmarks.texts import news


@dataclass(frozen=True)
class Options:
    """How to measure, for all tools alike."""

    device: str
    threads: int
    repeats: int = 1
    warm_up: bool = True


def measure(tool: str, work: Work, setting: Setting, options: Options) -> dict[str, Any]:
    """What the worker tells, plain JSON values: `seconds` is the best of all repeats.

    Raises RuntimeError with the last lines of a process that failed.
    """
    model = None if work.sizes is not None else smollm2()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "tokens.safetensors"
        save_file({"tokens": tokens(work, model)}, data)
        job = {
            "tool": tool,
            "work": asdict(work),
            "setting": asdict(setting),
            "model": None if model is None else str(model),
            "data": str(data),
            "device": options.device,
            "repeats": options.repeats,
            "warm_up": options.warm_up,
        }
        return _in_process(job, options, Path(folder))


def tokens(work: Work, model: Path | None) -> torch.Tensor:
    """(sample, token) int64: news in the tokens of `model`, or random ones where the work has random weights."""
    if work.sizes is not None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(work.sizes["vocab_size"], (work.samples, work.seq_len), generator=generator)
    from transformers import AutoTokenizer

    from fxcalib.data import build

    tokenizer = AutoTokenizer.from_pretrained(model)
    return torch.stack(build(news(), tokenizer, samples=work.samples, seq_len=work.seq_len).samples)


def _in_process(job: dict[str, Any], options: Options, folder: Path) -> dict[str, Any]:
    # In `folder`, since llm-compressor leaves log files where it runs; the root of the repository is on the path.
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, **thread_variables(options.threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""  # llm-compressor takes an accelerator wherever it sees one
    command = [sys.executable, "-m", "benchmarks.speed.worker", json.dumps(job)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RuntimeError(f"{job['tool']} failed with status {done.returncode}:\n{last}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured
