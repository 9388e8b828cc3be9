"""How each tool is set: rows of the table as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULTS = "defaults"


@dataclass(frozen=True)
class Setting:
    """One row: what the tool is called with beside the model, the data and the modifier."""

    name: str
    batch_size: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Of `fxcalib.calibrate`, or of llm-compressor's `oneshot`."""
    observer: str | None = None
    """How scales of weights are found; None leaves that to the tool: `mse` in fxcalib, `minmax` in llm-compressor."""


FXCALIB: dict[str, tuple[Setting, ...]] = {
    "cuda": (
        Setting("offload cpu", 2, {"offload": "cpu"}),
        Setting("offload none", 2, {"offload": "none"}),
        Setting("offload none, min-max scales", 2, {"offload": "none"}, observer="minmax"),
    ),
    "cpu": (Setting("batch 4", 4), Setting("batch 4, min-max scales", 4, observer="minmax")),
}
"""Device -> rows. The batches are those that `fxcalib.quantize` makes of these samples unless told otherwise."""

_ON_DEVICE = {"sequential_offload_device": "cuda", "sequential_prefetch": True}
LLMCOMPRESSOR: dict[str, tuple[Setting, ...]] = {
    "cuda": (
        Setting(DEFAULTS, 1),
        Setting("on device, prefetch", 1, _ON_DEVICE),
        Setting("on device, prefetch, batch 8", 8, _ON_DEVICE),
    ),
    "cpu": (Setting(DEFAULTS, 1), Setting("batch 4", 4), Setting("batch 8", 8)),
}
"""Device -> rows: what it does by default, and what its arguments offer to make it faster with the same result."""

FLOOR: dict[str, tuple[Setting, ...]] = {device: (Setting("-", 1),) for device in ("cuda", "cpu")}
"""The floor finds its batch sizes itself."""

TOOLS = {"fxcalib": FXCALIB, "llmcompressor": LLMCOMPRESSOR, "floor": FLOOR}
"""Tool -> device -> rows, in the order of the table."""
