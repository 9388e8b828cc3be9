"""The options of the benchmark, and what it prints and saves."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, idle_warning, pin_threads, usable_cores
from benchmarks.results import FOLDER, save
from benchmarks.speed import report
from benchmarks.speed.measuring import Options, measure
from benchmarks.speed.settings import TOOLS
from benchmarks.speed.works import WORKS, Work, chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    names = list(dict.fromkeys(name for works in WORKS.values() for name in works))
    settings = [setting.name for tool in TOOLS.values() for rows in tool.values() for setting in rows]
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs; saves no result")
    parser.add_argument(
        "--device",
        choices=list(WORKS),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda if there is one)",
    )
    parser.add_argument("--works", nargs="+", choices=names, metavar="WORK", help=f"only these of {', '.join(names)}")
    parser.add_argument("--tool", choices=list(TOOLS), help="only this")
    parser.add_argument(
        "--settings", nargs="+", choices=list(dict.fromkeys(settings)), metavar="NAME", help="only rows of these names"
    )
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many counts (default: 1)")
    parser.add_argument("--no-warm-up", action="store_true", help="measure what is initialized on first use as well")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads (default: all cores)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/speed_DEVICE.json)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and save what was measured, work by work; exits with 1 where a measurement failed."""
    try:
        works = chosen(arguments.device, arguments.works, quick=arguments.quick)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device; use --device cpu")
    if arguments.repeats < 1:
        raise SystemExit(f"error: --repeats is {arguments.repeats}; it must be at least 1")
    pin_threads(arguments.threads)
    warning = idle_warning()
    if warning:
        print(warning, file=sys.stderr)
    options = Options(arguments.device, arguments.threads, arguments.repeats, not arguments.no_warm_up)
    output = arguments.output or (None if arguments.quick else FOLDER / f"speed_{arguments.device}.json")
    measured: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        measured[name] = compare(name, work, options, arguments.tool, arguments.settings)
        if output:
            _save(output, name, measured[name])
    print(report.text(measured))
    if any("error" in row for result in measured.values() for row in result["rows"]):
        raise SystemExit(1)


def compare(
    name: str, work: Work, options: Options, tool: str | None = None, settings: list[str] | None = None
) -> dict[str, Any]:
    """One work by each tool in turn: `{"environment", "options", "work", "rows"}`, plain JSON values.

    A row has `seconds`, `peak_host_bytes` and `peak_device_bytes`, or `skipped` or `error` with the reason.
    """
    rows: list[dict[str, Any]] = []
    around = environment(options.threads)
    for each, by_device in TOOLS.items():
        if tool not in (None, each):
            continue
        if each == "llmcompressor" and find_spec("llmcompressor") is None:
            rows.append({"tool": each, "setting": "-", "seconds": None, "skipped": "not installed"})
            continue
        for setting in by_device[options.device]:
            if settings is not None and each != "floor" and setting.name not in settings:
                continue
            print(f"{name}: running {each}, {setting.name} ...", file=sys.stderr, flush=True)
            row: dict[str, Any] = {"tool": each, "setting": setting.name}
            try:
                row |= measure(each, work, setting, options)
                print(f"{name}: {row['seconds']:.3f} s", file=sys.stderr, flush=True)
            except RuntimeError as error:  # of the measured process: the others may still be measured
                print(error, file=sys.stderr, flush=True)
                row |= {"seconds": None, "error": str(error)}
            rows.append(row)
    return {
        "environment": around,
        "options": vars(options),
        "work": vars(work),
        "rows": report.with_ratios(rows),
    }


def _save(path: Path, name: str, result: dict[str, Any]) -> None:
    """Add one work to the file, or replace it; works that other runs measured stay, each with its own environment."""
    works = json.loads(path.read_text())["works"] if path.exists() else {}
    save(path, {"works": {**works, name: result}})
