"""What a run did, as one frozen value: per module, per subgraph and in total. It prints as text and travels as JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcalib.modifiers.base import ModuleResult

PACKAGES = ("fxcalib", "torch", "transformers", "compressed-tensors")
WORST_MODULES = 8
NOTED_PART = 0.01
"""Of all parameters: convolution kernels and the like are less, and nobody expects them to be quantized."""


WORK = {
    "trace": "tracing and partitioning the model",
    "data": "taking in batches",
    "forward": "running the model",
    "statistics": "collecting statistics of inputs",
    "solve": "quantizing weights",
    "copies": "waiting for activations and weights",
    "other": "everything else",
}
"""Kinds of work that a profile tells apart."""


@dataclass(frozen=True)
class SubgraphReport:
    """Where the time of one subgraph went, in seconds; 0 where the plan had no such step."""

    index: int
    """Number of the subgraph, from 0."""
    targets: tuple[str, ...]
    """Qualified names of the sequential targets that it runs."""
    calibrate_seconds: float
    commit_seconds: float
    propagate_seconds: float


@dataclass(frozen=True)
class Report:
    """The result of `calibrate` or `quantize`, and the content of `fxcalib_report.json`."""

    model: str
    """Name, hub id or path of the model; the class name of an in-memory model without one."""
    pipeline: str
    algorithm: str
    scheme: str
    subgraphs: tuple[SubgraphReport, ...]
    modules: tuple[ModuleResult, ...]
    """One result for each compressed module, in the order in which they were compressed."""
    seconds: float
    """Wall time of the whole job."""
    timings: Mapping[str, float]
    """Phase -> seconds."""
    tokens: int
    """Calibration tokens, each counted once, without padding."""
    samples: int
    batches: int
    passes: int
    """Passes over all batches that were run: calibrations and propagations."""
    retraces: int
    """How often a batch broke a guard and the model was traced again."""
    peak_host_bytes: int
    peak_device_bytes: int
    seed: int
    data: Mapping[str, object]
    """What identifies the calibration data: `source`, `fingerprint`, ..."""
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What is worth to know about the result, such as a part of the weights that cannot be quantized."""
    output: str | None = None
    """Folder of the checkpoint; None where nothing was saved."""
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    profile: Mapping[str, float] = field(default_factory=dict)
    """Kind of work -> seconds, which add up to those of `calibrate`; empty where it was not asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data. A number that is not finite becomes text (`nan`, `inf`), as JSON has no such numbers."""
        return dict(plain(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave. Unknown keys are ignored, so that older code reads newer reports."""
        from fxcalib.modifiers.base import ModuleResult

        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["subgraphs"] = tuple(
            SubgraphReport(**{**item, "targets": tuple(item["targets"])}) for item in data["subgraphs"]
        )
        values["modules"] = tuple(
            ModuleResult(**{**item, "error": _number(item["error"]), "notes": tuple(item["notes"])})
            for item in data["modules"]
        )
        for key in ("warnings", "notes"):
            values[key] = tuple(data.get(key, ()))
        for key in ("perplexity_before", "perplexity_after"):
            values[key] = _number(data.get(key))
        return cls(**values)

    def summary(self) -> dict[str, Any]:
        """The totals, as `fxcalib quantize --json` prints them: seconds, bytes, and subgraphs and modules as counts."""
        totals = {
            "output": self.output,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "subgraphs": len(self.subgraphs),
            "modules": len(self.modules),
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
        }
        return {key: plain(value) for key, value in totals.items()}

    def worst(self, count: int = WORST_MODULES) -> tuple[ModuleResult, ...]:
        """The `count` modules with the largest measured errors, worst first; NaN counts as the worst."""
        measured = [(m.error, m) for m in self.modules if m.error is not None]
        ordered = sorted(measured, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], reverse=True)
        return tuple(module for _, module in ordered[:count])

    def profile_table(self) -> list[str]:
        """Where the time of the calibration went, as lines of text; none where it was not asked for."""
        whole = sum(self.profile.values())
        if not whole:
            return []
        kinds = [(f"{kind} ({what})", self.profile[kind]) for kind, what in WORK.items() if self.profile.get(kind)]
        rows = [*kinds, ("all", whole)]
        width = max(len(kind) for kind, _ in rows)
        return ["time of the calibration:", *(f"  {kind:<{width}}  {s:8.2f} s  {s / whole:4.0%}" for kind, s in rows)]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.algorithm} {self.scheme}, {self.pipeline} pipeline",
            f"  {len(self.modules)} modules in {len(self.subgraphs)} subgraphs, {self.passes} passes over "
            f"{self.batches} batches ({self.samples} samples, {self.tokens:,} tokens)",
            f"  {format_seconds(self.seconds)}" + _timings(self.timings) + f"; peak memory "
            f"{format_bytes(self.peak_host_bytes)} host, {format_bytes(self.peak_device_bytes)} device",
        ]
        if self.perplexity_before is not None or self.perplexity_after is not None:
            lines.append(f"  perplexity {_perplexity(self.perplexity_before)} -> {_perplexity(self.perplexity_after)}")
        lines += [f"  {row}" for row in self.profile_table()]
        worst = self.worst()
        if worst:
            lines.append("  largest errors:")
            lines += ["    " + row for row in _table(worst)]
        noted = [m for m in self.modules if m.notes]
        lines += [f"  note: {m.name}: {'; '.join(m.notes)}" for m in noted]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.output is not None:
            lines.append(f"  saved to {self.output}")
        return "\n".join(lines)


def unquantized_note(parameters: Mapping[str, int], total: int) -> str | None:
    """That parameters, given by class of module, of `total` in the model cannot be quantized; None for a small part."""
    count = sum(parameters.values())
    if count < NOTED_PART * total or not count:
        return None
    classes = ", ".join(list(parameters)[:4])
    return (
        f"{count:,} of {total:,} parameters ({count / total:.0%}) stay as they are: they are in {classes}, "
        "and only Linear and Embedding modules can be quantized"
    )


def versions() -> dict[str, str]:
    """Package -> version of what the result depends on, without importing any of it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "unknown"
    return found


def format_bytes(count: float) -> str:
    """`count` bytes as readable text, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """`seconds` as readable text, such as `3.2 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plain(value: object) -> Any:
    """`value` as JSON data; a number that is not finite becomes text, as JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _table(modules: Sequence[ModuleResult]) -> list[str]:
    width = max(len(m.name) for m in modules)
    return [f"{m.name:<{width}}  {m.error:.3e} of {m.measure}  {m.scheme}" for m in modules]


def _timings(timings: Mapping[str, float]) -> str:
    if not timings:
        return ""
    return " (" + ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in timings.items()) + ")"


def _perplexity(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)
