"""`python -m benchmarks zoo`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, pin_threads
from benchmarks.results import FOLDER, save

QUICK = 6
TOOLS = ("fxcalib", "suspended", "llmcompressor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} architectures; saves no result")
    parser.add_argument("--slice", choices=["all", "ci"], default="all", help="which architectures (default: all)")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="categories, such as causal_lm")
    parser.add_argument("--only", metavar="REGEX", help="architectures with this in `category/model_type/class`")
    parser.add_argument("--list", action="store_true", help="list the architectures chosen and run nothing")
    parser.add_argument("--tool", choices=TOOLS, default="fxcalib", help="what to score (default: fxcalib)")
    parser.add_argument("--peer", choices=TOOLS, action="append", default=[], help="score another tool beside it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side (default: 1)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one architecture (default: 240)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/zoo.json)")


def run(arguments: argparse.Namespace) -> None:
    """Score, print the report and save it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pin_threads(1)
    from benchmarks.zoo import report
    from benchmarks.zoo.architectures import architectures, chosen
    from benchmarks.zoo.running import run_all
    from benchmarks.zoo.slices import ci_slice

    everything = ci_slice() if arguments.slice == "ci" or arguments.quick else architectures()
    wanted = chosen(everything, arguments.categories, arguments.only)[: QUICK if arguments.quick else None]
    if arguments.list or not wanted:
        print("\n".join(architecture.name for architecture in wanted) or "no architecture matches")
        return
    tools = list(dict.fromkeys([arguments.tool, *arguments.peer]))
    jobs = [(architecture, tool) for architecture in wanted for tool in tools]
    _preload(tools)
    records: list[dict[str, Any]] = []
    started = time.monotonic()
    for record in run_all(jobs, arguments.jobs, arguments.timeout):
        records.append(record)
        print(_progress(record, len(records), len(jobs), time.monotonic() - started), file=sys.stderr, flush=True)
    order = {(architecture.name, tool): index for index, (architecture, tool) in enumerate(jobs)}
    records.sort(key=lambda record: order[record["name"], record["tool"]])
    print(report.text(records))
    output: Path | None = arguments.output or (None if arguments.quick else FOLDER / "zoo.json")
    if output:
        content = {"environment": environment(1), "jobs": arguments.jobs, "summary": report.summary(records)}
        lists = {"not_in_full": report.failures(records), "not_scored": report.unscored(records)}
        save(output, {**content, **lists})


def _preload(tools: Sequence[str]) -> None:
    """Import what every process needs, once."""
    for module in ("torch._dynamo", "transformers.modeling_utils", "fxcalib.suspended", "benchmarks.zoo.families"):
        importlib.import_module(module)
    from benchmarks.zoo.tools import tool

    for name in tools:
        tool(name)


def _progress(record: dict[str, Any], done: int, total: int, seconds: float) -> str:
    from benchmarks.zoo import report

    left = int(seconds / done * (total - done))
    if not record["built"]:
        state = f"not built: {record.get('reason') or record.get('crash') or record.get('error')}"
    elif not record["deterministic"]:
        state = "not deterministic"
    else:
        failed = report.failures([record])
        state = "FAILED " + failed[0].split(": ", 2)[-1] if failed else "full"
    label = f"{record['name']} [{record['tool']}]"
    return f"{done}/{total} ({left // 60}:{left % 60:02d} left) {label:<70} {record['seconds']:5.1f} s  {state[:200]}"
