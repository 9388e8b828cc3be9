"""How fast this machine multiplies and copies: measured once, kept in the user's cache, used to estimate times."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

_SIZE = {"cpu": 1024, "accelerator": 8192}
_COPIED = 1 << 26
_SECONDS = 0.5


@dataclass(frozen=True)
class Rates:
    """What one device reaches."""

    matmul: Mapping[str, float] = field(default_factory=dict)
    """Dtype -> floating-point operations a second in a matrix product."""
    elementwise: float = 0.0
    """Bytes read and written a second by an addition."""
    to_device: float = 0.0
    """Bytes a second from pageable host memory; 0 for the CPU itself."""
    to_host: float = 0.0

    def seconds(self, flops: int, float32_flops: int, traffic: int, dtype: str) -> float:
        """Time of so many operations, `float32_flops` of them in float32 and the others in `dtype`."""
        own = self.matmul.get(dtype, self.matmul["float32"])
        product = (flops - float32_flops) / own + float32_flops / self.matmul["float32"]
        return product + traffic / self.elementwise


def path() -> Path:
    """Where the rates are kept: `fxcalib/machine.json` under XDG_CACHE_HOME, else under ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fxcalib" / "machine.json"


def read(device: torch.device) -> Rates | None:
    """The rates of `device`; None where they were never measured with this many threads, or cannot be read."""
    try:
        held = json.loads(path().read_text(encoding="utf-8"))
        return Rates(**held[_key(device)])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(device: torch.device) -> Rates:
    """Measure `device` in a few seconds and keep the result."""
    kind = "cpu" if device.type == "cpu" else "accelerator"
    size = _SIZE[kind]
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        square = torch.ones(size, size, dtype=dtype, device=device)
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / _seconds(lambda x=square: x @ x, device)  # type: ignore[misc]
    values = torch.ones(_COPIED // 4, device=device)
    added = torch.empty_like(values)
    elementwise = 3 * values.nbytes / _seconds(lambda: torch.add(values, values, out=added), device)
    there = back = 0.0
    if device.type != "cpu":
        host = torch.ones(_COPIED // 4)
        there = host.nbytes / _seconds(lambda: host.to(device), device)
        back = host.nbytes / _seconds(lambda: values.to("cpu"), device)
    rates = Rates(matmul, elementwise, there, back)
    _write({_key(device): asdict(rates)})
    return rates


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least time of one call, after one that does not count."""
    best, spent = float("inf"), 0.0
    for repeat in range(50):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        passed = time.perf_counter() - started
        if repeat:
            best, spent = min(best, passed), spent + passed
        if spent > _SECONDS:
            break
    return best


def _write(rates: Mapping[str, Any]) -> None:
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({**held, **rates}, file, indent=2)
    os.replace(name, target)


def _key(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
