"""The job without a model of one's own: the shipped model, quantized twice, to see what calibration is worth."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fxcalib.progress import Progress
from fxcalib.report import Report, format_bytes, format_seconds

NAME = "fxcalib-embedded"
BASELINE = "rtn"


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    name: str
    perplexity: float
    """On held-out text."""
    bytes: int
    """Size of its weight files."""
    seconds: float | None
    """Time to make it; None for the original."""


@dataclass(frozen=True)
class Comparison:
    """The original, its rounding to nearest, and what the chosen algorithm made of it."""

    rows: tuple[Row, ...]
    report: Report
    """Of the chosen algorithm, whose checkpoint was kept."""

    def table(self) -> Table:
        """The rows with the loss of perplexity against the original."""
        table = Table(title=f"{NAME}, {self.report.scheme}: perplexity on held-out text, lower is better")
        table.add_column("model")
        for column in ("perplexity", "against original", "weights", "time"):
            table.add_column(column, justify="right")
        original = self.rows[0].perplexity
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.perplexity:.3f}",
                "" if row.seconds is None else f"{(row.perplexity / original - 1) * 100:+.2f}%",
                format_bytes(row.bytes),
                "" if row.seconds is None else format_seconds(row.seconds),
            )
        return table


def compare(
    *, output: str | Path, algorithm: str = "gptq", progress: Progress | None = None, **options: Any
) -> Comparison:
    """Quantize the shipped model by rounding to nearest and by `algorithm`, with the same `options` of `quantize`.

    Only the checkpoint of `algorithm` is kept, in the folder `output`. Raises what `quantize` raises.
    """
    from fxcalib import embedded
    from fxcalib.api import quantize
    from fxcalib.checkpoint import prepare_output

    prepare_output(output, overwrite=bool(options.get("overwrite", False)))
    source = Path(embedded.MODEL_DIR)
    settings: dict[str, Any] = {**options, "evaluate": True, "progress": progress}
    rows: list[Row] = []
    if algorithm != BASELINE:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / BASELINE
            baseline = quantize(source, **{**settings, "algorithm": BASELINE, "output": folder})
            rows.append(_row("round to nearest", baseline, folder))
    report = quantize(source, **{**settings, "algorithm": algorithm, "output": output})
    rows.append(_row("round to nearest" if algorithm == BASELINE else algorithm.upper(), report, Path(output)))
    assert report.perplexity_before is not None
    original = Row("original", report.perplexity_before, _weight_bytes(source), None)
    return Comparison(rows=(original, *rows), report=report)


def _row(name: str, report: Report, folder: Path) -> Row:
    assert report.perplexity_after is not None
    return Row(name, report.perplexity_after, _weight_bytes(folder), report.seconds)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
