"""Speed: how long calibration takes, beside llm-compressor and beside the floor that the machine's own rates set.

What is measured is data (`works`, `settings`); each measurement runs in a process of its own (`worker`).
"""

from __future__ import annotations

from benchmarks.speed.command import add_arguments, run

__all__ = ["add_arguments", "run"]
