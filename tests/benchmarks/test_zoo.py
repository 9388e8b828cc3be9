"""The representative slice of the zoo is traced, cut and run exactly; and what surrounds the scores."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.zoo import report, running
from benchmarks.zoo.architectures import CATEGORIES, PLAIN, REMOTE_CODE, Architecture, architectures, chosen
from benchmarks.zoo.scoring import Score, records
from benchmarks.zoo.slices import CI, ci_slice
from benchmarks.zoo.tools import Fxcalib, Tool, tool

SLICE = ci_slice()
MAIN_CATEGORIES = list(CATEGORIES)[:9]


@pytest.mark.parametrize("architecture", SLICE, ids=lambda architecture: architecture.name)
def test_every_architecture_of_the_slice_scores_in_full(architecture: Architecture) -> None:
    *_, record = records(architecture, Fxcalib())
    assert record["built"], record
    assert record["deterministic"] and record["sensitive"] and record["complete"]
    assert not report.failures([{**record, "tool": "fxcalib"}])
    assert report.is_full(record)
    assert not report.disturbed([{**record, "tool": "fxcalib"}])


def test_the_slice_represents_the_zoo() -> None:
    assert len(SLICE) >= 60
    assert {architecture.class_name for architecture in SLICE} == CI
    found = {architecture.category for architecture in SLICE}
    assert found >= {*MAIN_CATEGORIES, REMOTE_CODE, PLAIN}
    assert len(found) >= 35


def test_every_architecture_is_listed_once() -> None:
    everything = architectures()
    assert len({a.class_name for a in everything}) == len(everything) > 1000
    owners = {a.class_name: a.category for a in everything}
    assert owners["Gemma3ForConditionalGeneration"] == "image_text_to_text"  # a mapping of text models lists it too
    assert owners["LlamaModel"] == "base"
    assert [a.class_name for a in chosen(everything, ["causal_lm"], "/llama/")] == ["LlamaForCausalLM"]


def _scores(architecture: Architecture, tool: Tool) -> Iterator[dict[str, Any]]:
    record = {"name": architecture.name, "category": "a", "built": True, "deterministic": True, "sensitive": True}
    record["scores"] = []
    yield record
    match architecture.class_name:
        case "Crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "Hang":
            time.sleep(60)
        case "Error":
            raise RuntimeError("no such thing")
        case "Memory":
            limit = running.address_space()
            held = bytearray(limit) if limit is not None else None
            raise MemoryError(held)
    yield {**record, "complete": True}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_ends_early_costs_one_architecture_alone() -> None:
    jobs = [(Architecture("a", "b", name), "fxcalib") for name in ("Good", "Crash", "Hang", "Error", "Memory")]
    found = {record["name"]: record for record in running.run_all(jobs, at_once=3, timeout=6, score=_scores)}
    assert len(found) == 5
    assert "crash" not in found["a/b/Good"]
    assert found["a/b/Crash"]["crash"] == "died of SIGKILL"
    assert found["a/b/Hang"]["crash"] == "took more than 6 s"
    assert found["a/b/Error"]["crash"] == "exited with 1" and "no such thing" in found["a/b/Error"]["error"]
    assert "MemoryError" in found["a/b/Memory"]["error"]
    assert all(record["built"] for record in found.values())


def test_address_space_is_not_limited_with_builds_for_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.version.hip", None)
    assert running.address_space() == 14 * 2**30
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert running.address_space() is None


def _record(
    name: str, category: str = "causal_lm", tool: str = "fxcalib", *, linear: bool = False, **changes: Any
) -> dict[str, Any]:
    good = Score("default", "eager", True, True, True, True, True)
    kinds = [(targets, attention) for attention in ("eager", "sdpa") for targets in ("default", "decoder")]
    kinds += [("linear", "eager")] if linear else []
    scores = [{**vars(good), "targets": targets, "attention": attention, "full": True} for targets, attention in kinds]
    record = {"name": f"{category}/{name}", "category": category, "tool": tool, "built": True}
    return {**record, "deterministic": True, "sensitive": True, "scores": scores, **changes}


def test_the_report() -> None:
    bad = _record("bad/Bad")
    bad["scores"][0].update(exact=False, wrong=True, full=False, cause="batch 0: logits differs by up to 0.5")
    partial = _record("partial/Partial", linear=True)
    partial["scores"][-1].update(others=False, full=False, cause="batch 1: RuntimeError: sizes differ")
    found = [
        _record("good/Good", linear=True),
        bad,
        partial,
        _record("crash/Crash", scores=[], crash="died of SIGKILL"),
        _record("none/None", "ctc", built=False, stage="init", reason="needs a package"),
        _record("random/Random", "ctc", deterministic=False),
        _record("still/Still", "ctc", sensitive=False, sdpa="init: no sdpa"),
    ]
    text = report.text(found)
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[3:-1]] for line in text.splitlines()[2:5]}
    assert rows == {
        "causal_lm": ["3/4", "3/4", "2/4", "3/4", "3/4", "2/4", "2/4", "3/4", "3/3", "1/2", "2/4", "1", "0"],
        "ctc": ["1/1", "1/1", "1/1", "1/1", "1/1", "1/1", "1/1", "1/1", "1/1", "0/0", "1/1", "0", "0"],
        "all": ["4/5", "4/5", "3/5", "4/5", "4/5", "3/5", "3/5", "4/5", "4/4", "1/2", "3/5", "1", "0"],
    }
    assert text.split("\n\n")[1:] == [
        "not in full (3):\n"
        "- fxcalib: causal_lm/bad/Bad: WRONG with eager attention, default targets, eager attention: "
        "batch 0: logits differs by up to 0.5\n"
        "- fxcalib: causal_lm/partial/Partial: linear targets, eager attention: batch 1: RuntimeError: sizes differ\n"
        "- fxcalib: causal_lm/crash/Crash: process: died of SIGKILL",
        "not scored (4):\n"
        "- ctc/none/None: not built (init): needs a package\n"
        "- ctc/random/Random: not deterministic: its eager forward gives other bits the second time\n"
        "- ctc/still/Still: not scored with sdpa: init: no sdpa\n"
        "- ctc/still/Still: scored, but its output does not depend on its input",
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_command_lists_and_runs(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["zoo", "--list", "--slice", "ci", "--categories", "plain"]) == 0
    assert "plain/module/ResNet\n" in capfd.readouterr().out
    output = tmp_path / "zoo.json"
    arguments = ["zoo", "--only", "plain/module/VisionT", "--tool", "suspended", "--output", str(output)]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    assert "| plain    | suspended | 1/1" in printed.out
    assert "1/1 (0:00 left) plain/module/VisionTransformer [suspended]" in printed.err
    saved = json.loads(output.read_text())
    assert saved["summary"][0]["full"] == "1/1" and not saved["not_in_full"]
    assert "torch" in saved["environment"]["versions"]


def test_tools_are_found_by_name() -> None:
    assert isinstance(tool("fxcalib"), Fxcalib)
    with pytest.raises(KeyError):
        tool("other")
