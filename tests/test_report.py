"""A report survives JSON, prints what matters and needs no torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fxcalib.memory import peak_device_bytes, peak_host_bytes, reset_peaks
from fxcalib.modifiers.base import ModuleResult
from fxcalib.report import Report, SubgraphReport, format_bytes, format_seconds, versions

REPORT = Report(
    model="tiny",
    pipeline="sequential",
    algorithm="gptq",
    scheme="W4A16",
    subgraphs=(SubgraphReport(0, ("layers.0",), 1.0, 0.5, 1.0), SubgraphReport(1, ("layers.1",), 1.0, 0.5, 0.0)),
    modules=(
        ModuleResult("layers.0.up", "int4 group 64", 0.01, "output", 0.1),
        ModuleResult("layers.0.down", "int4 group 64", 0.2, "output", 0.1, ("damping raised to 0.1",)),
        ModuleResult("layers.1.up", "int4 group 64", None, "weight", 0.1),
    ),
    seconds=75.0,
    timings={"load": 1.0, "calibrate": 74.0},
    tokens=32768,
    samples=64,
    batches=64,
    passes=3,
    retraces=0,
    peak_host_bytes=3 << 30,
    peak_device_bytes=0,
    seed=7,
    data={"source": "news.jsonl", "fingerprint": "abc"},
    versions={"fxcalib": "0.1.0"},
    warnings=("one",),
    output="tiny-W4A16",
    perplexity_before=10.0,
)

TEXT = """\
tiny: gptq W4A16, sequential pipeline
  3 modules in 2 subgraphs, 3 passes over 64 batches (64 samples, 32,768 tokens)
  1 min 15 s (load 1.0 s, calibrate 1 min 14 s); peak memory 3.0 GiB host, 0 B device
  perplexity 10.000 -> not measured
  largest errors:
    layers.0.down  2.000e-01 of output  int4 group 64
    layers.0.up    1.000e-02 of output  int4 group 64
  note: layers.0.down: damping raised to 0.1
  warning: one
  saved to tiny-W4A16"""


def test_text() -> None:
    assert str(REPORT) == TEXT


def test_json_round_trip() -> None:
    assert Report.from_dict(json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))) == REPORT
    assert Report.from_dict(REPORT.to_dict() | {"of_a_later_version": 1}) == REPORT


def test_numbers_that_json_lacks() -> None:
    broken = replace(REPORT, modules=(replace(REPORT.modules[0], error=math.nan),), perplexity_after=math.inf)
    restored = Report.from_dict(json.loads(json.dumps(broken.to_dict(), allow_nan=False)))
    assert restored.modules[0].error is not None
    assert math.isnan(restored.modules[0].error)
    assert restored.perplexity_after == math.inf


def test_summary_has_the_keys_of_the_json_line() -> None:
    assert REPORT.summary() == {
        "output": "tiny-W4A16",
        "seconds": 75.0,
        "tokens": 32768,
        "subgraphs": 2,
        "modules": 3,
        "peak_host_bytes": 3 << 30,
        "peak_device_bytes": 0,
        "perplexity_before": 10.0,
        "perplexity_after": None,
    }


def test_worst_modules_come_first_and_nan_is_the_worst() -> None:
    nan = replace(REPORT.modules[0], name="nan", error=math.nan)
    assert [m.name for m in replace(REPORT, modules=(*REPORT.modules, nan)).worst(2)] == ["nan", "layers.0.down"]


def test_versions() -> None:
    found = versions()
    assert list(found) == ["python", "fxcalib", "torch", "transformers", "compressed-tensors"]
    assert torch.__version__.startswith(found["torch"])


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (245.0, "4 min 05 s"), (7800.0, "2 h 10 min")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_reports_need_no_torch() -> None:
    code = "import sys, fxcalib.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peak_host_memory_sees_what_was_allocated() -> None:
    reset_peaks()
    before = peak_host_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_host_bytes() >= before + block.numel() // 2
    assert peak_device_bytes() >= 0
