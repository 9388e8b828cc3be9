"""The job without a model of one's own: the shipped model, compressed twice, to see what calibration is worth."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fxcalib.progress import Progress
from fxcalib.report import Report, format_bytes, format_seconds

NAME = "fxcalib-embedded"
BASELINES = {"gptq": "rtn", "awq": "rtn", "sparsegpt": "magnitude", "wanda": "magnitude"}
"""What needs no data and does the same kind of thing."""
NAMES = {"rtn": "round to nearest", "magnitude": "magnitude pruning"}


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
    """The original, what the baseline made of it, and what the chosen algorithm made of it."""

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
    *,
    output: str | Path,
    algorithm: str = "gptq",
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Compress the shipped model by `algorithm` or `recipe`, and by what an algorithm is measured against.

    All `options` of `quantize` are the same for both, but for SmoothQuant, which is part of the algorithm. Only the
    checkpoint of `algorithm` is kept, in the folder `output`. Raises what `quantize` raises.
    """
    from fxcalib import embedded
    from fxcalib.api import quantize
    from fxcalib.checkpoint import prepare_output

    prepare_output(output, overwrite=bool(options.get("overwrite", False)))
    source = Path(embedded.MODEL_DIR)
    settings: dict[str, Any] = {**options, "evaluate": True, "progress": progress}
    rows: list[Row] = []
    baseline = None if recipe is not None else BASELINES.get(algorithm.lower())
    if baseline is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / baseline
            plain = {**settings, "smoothquant": None, "algorithm": baseline, "output": folder}
            rows.append(_row(NAMES[baseline], quantize(source, **plain), folder))
    report = quantize(source, **{**settings, "algorithm": algorithm, "recipe": recipe, "output": output})
    name = NAMES.get(algorithm.lower(), algorithm.upper()) if recipe is None else Path(recipe).name
    rows.append(_row(name, report, Path(output)))
    assert report.perplexity_before is not None
    original = Row("original", report.perplexity_before, _weight_bytes(source), None)
    return Comparison(rows=(original, *rows), report=report)


def _row(name: str, report: Report, folder: Path) -> Row:
    assert report.perplexity_after is not None
    return Row(name, report.perplexity_after, _weight_bytes(folder), report.seconds)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
