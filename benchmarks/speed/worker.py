"""One measurement in this process, for `benchmarks.speed`: a JSON job as argument, a JSON line as result."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.speed.calibrations import CALIBRATIONS
from benchmarks.speed.clock import seconds
from benchmarks.speed.floor import floor
from benchmarks.speed.models import host_model
from benchmarks.speed.settings import Setting
from benchmarks.speed.works import Work
from fxcalib import memory


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Measure `job["tool"]`: `seconds` of the calibration alone, of the best repeat, and peaks in bytes."""
    work, setting, device = Work(**job["work"]), Setting(**job["setting"]), torch.device(job["device"])
    folder = None if job["model"] is None else Path(job["model"])
    tokens = load_file(job["data"])["tokens"]
    if job["tool"] == "floor":
        return floor(host_model(work, folder, device), tokens, work, device, job["repeats"])
    if job["warm_up"]:
        warm = tokens[: 2 * setting.batch_size]
        _calibrate(job["tool"], work, setting, folder, warm, device, layers=1)
    repeats = [
        _calibrate(job["tool"], work, setting, folder, tokens, device, layers=None) for _ in range(job["repeats"])
    ]
    best = min(repeats, key=lambda repeat: repeat["seconds"])
    return {**best, "all_seconds": [repeat["seconds"] for repeat in repeats]}


def _calibrate(
    tool: str,
    work: Work,
    setting: Setting,
    folder: Path | None,
    tokens: Tensor,
    device: torch.device,
    *,
    layers: int | None,
) -> dict[str, Any]:
    model = host_model(work, folder, device, layers)
    calibration = CALIBRATIONS[tool](model, tokens, work, setting, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    memory.reset_peaks()
    return {
        "seconds": seconds(calibration, device),
        "peak_host_bytes": memory.peak_host_bytes(),
        "peak_device_bytes": memory.peak_device_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
