"""What a measurement depends on: hardware, versions, date, other load, threads. Nothing that names the machine."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

PACKAGES = ("fxcalib", "torch", "transformers", "compressed-tensors", "datasets", "numpy", "llmcompressor")

IDLE_LOAD = 0.3
"""Load average, in running processes, up to which a machine counts as idle: nothing but what watches it."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(threads: int | None = None) -> dict[str, object]:
    """Hardware, versions and date (UTC) as plain JSON values; `threads` is what the measurement was pinned to."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": memory_gib(),
        "accelerators": accelerators(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": load_average(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Package -> version of what takes part in the measurements and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Model name of the processor as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """Main memory in GiB; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def accelerators() -> list[str]:
    """Names of the CUDA devices."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def load_average() -> float | None:
    """Running processes, averaged over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def idle_warning() -> str | None:
    """What to tell the user when the machine does other work, which distorts timings; None when it is idle."""
    load = load_average()
    if load is None or load <= IDLE_LOAD:
        return None
    return (
        f"warning: the load average is {load:.2f} on {usable_cores()} cores: timings are distorted by whatever else "
        f"runs; for numbers to report, wait until it is below {IDLE_LOAD}"
    )


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that pin a process to be started to `threads` compute threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def pin_threads(threads: int) -> None:
    """Pin the compute threads of this process, and by its environment those of processes it starts."""
    import torch

    os.environ.update(thread_variables(threads))
    torch.set_num_threads(threads)
