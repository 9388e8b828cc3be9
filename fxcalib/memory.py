"""Peak memory of this process, as the operating system and the device's allocator count it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peaks() -> None:
    """Begin to measure anew. Where the system cannot forget its peak, the host peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: 5 resets VmHWM
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            with contextlib.suppress(RuntimeError):  # an allocator that has not begun yet has no peak to forget
                torch.accelerator.reset_peak_memory_stats(index)


def peak_host_bytes() -> int:
    """Largest resident set of this process in bytes since `reset_peaks`; 0 where the system does not tell (Windows)."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def peak_device_bytes() -> int:
    """Most bytes of tensors that were alive on one accelerator since `reset_peaks`; 0 without an accelerator."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return 0
    return max(int(torch.accelerator.max_memory_allocated(i)) for i in range(torch.accelerator.device_count()))
