"""The speed benchmark: what it computes, and a run on tiny models."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from benchmarks.__main__ import main
from benchmarks.speed import command, report
from benchmarks.speed.calibrations import groups
from benchmarks.speed.clock import fastest
from benchmarks.speed.floor import extremes, floor, hessian
from benchmarks.speed.floor_inputs import Distinct, Shapes
from benchmarks.speed.floor_weights import Solves, round_to_nearest
from benchmarks.speed.measuring import Options, measure, tokens
from benchmarks.speed.models import host_model
from benchmarks.speed.settings import TOOLS, Setting
from benchmarks.speed.works import STATIC_FP8, WORKS, Work, chosen

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> Work:
    return WORKS["cpu"]["gptq"].tiny()


@pytest.fixture(scope="module")
def shapes(work: Work) -> Shapes:
    with torch.no_grad():
        return Shapes(host_model(work, None, CPU), tokens(work, None), CPU)


def _row(tool: str, setting: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    return {"tool": tool, "setting": setting, "seconds": seconds, **more}


def _ratios(rows: list[dict[str, Any]]) -> list[tuple[float | None, float | None, float | None]]:
    keys = report.PEER_DEFAULTS, report.PEER_BEST, report.OVER_FLOOR
    return [tuple(row[key] for key in keys) for row in report.with_ratios(rows)]  # type: ignore[misc]


def test_ratios() -> None:
    rows = [
        _row("fxcalib", "offload cpu", 2.0),
        _row("fxcalib", "offload none", 1.6),
        _row("llmcompressor", "defaults", 16.0),
        _row("llmcompressor", "batch 8", 8.0),
        _row("floor", "-", 1.0),
    ]
    expected = [(8.0, 4.0, 2.0), (10.0, 5.0, 1.6), (None, None, 16.0), (None, None, 8.0), (None, None, None)]
    assert _ratios(rows) == expected


def test_defaults_that_are_best_are_both() -> None:
    rows = [_row("fxcalib", "a", 2.0), _row("llmcompressor", "defaults", 6.0), _row("llmcompressor", "batch 8", 8.0)]
    assert _ratios(rows)[0] == (3.0, 3.0, None)


def test_ratios_to_what_was_not_measured_are_none() -> None:
    failed = [_row("fxcalib", "a", 2.0), _row("llmcompressor", "defaults", None, error="x"), _row("floor", "-", None)]
    assert _ratios(failed) == [(None, None, None)] * 3
    best = [_row("fxcalib", "a", 2.0), _row("llmcompressor", "defaults", None), _row("llmcompressor", "b", 8.0)]
    assert _ratios(best)[0] == (None, 4.0, None)
    assert _ratios([_row("fxcalib", "a", None, error="x"), _row("floor", "-", 1.0)])[0] == (None, None, None)


def test_the_tables() -> None:
    parts = {"forwards": 0.75, "statistics": 0.25}
    rows = [
        _row("fxcalib", "offload cpu", 2.0, peak_device_bytes=2**30, peak_host_bytes=2**32),
        _row("fxcalib", "offload none", None, error="out of memory"),
        _row("llmcompressor", "-", None, skipped="not installed"),
        _row("floor", "-", 1.0, parts=parts),
    ]
    made = report.text({"fp8": {"options": {"device": "cuda"}, "rows": report.with_ratios(rows)}})
    first, second = (
        [[c.strip() for c in line.split("|")[1:-1]] for line in t.splitlines()] for t in made.split("\n\n")
    )
    assert first[0][4] == "peak on device, GiB"
    assert first[2:] == [
        ["fp8", "fxcalib", "offload cpu", "2", "1", "-", "-", "2"],
        ["fp8", "fxcalib", "offload none: failed", "-", "-", "-", "-", "-"],
        ["fp8", "llm-compressor", "not installed", "-", "-", "-", "-", "-"],
        ["fp8", "floor", "-", "1", "-", "-", "-", "-"],
    ]
    assert second[0] == ["floor of", "forwards, s", "statistics, s", "sum, s"]
    assert second[2:] == [["fp8", "0.75", "0.25", "1"]]


def test_works_are_chosen_by_device() -> None:
    assert list(chosen("cuda", ["fp8"], quick=False)) == ["fp8"]
    assert list(chosen("cpu", None, quick=False)) == list(WORKS["cpu"])
    with pytest.raises(ValueError, match="no work 'fp8' for cpu; choose from gptq, w8a8, rtn"):
        chosen("cpu", ["fp8"], quick=False)
    quick = chosen("cpu", None, quick=True)
    assert set(quick) == {*WORKS["cuda"], *WORKS["cpu"]}
    assert all(each.samples <= 8 and each.sizes is not None for each in quick.values())


def test_a_work_of_another_device_is_refused() -> None:
    with pytest.raises(SystemExit, match="error: no work 'fp8' for cpu"):
        main(["speed", "--device", "cpu", "--works", "fp8"])
    with pytest.raises(SystemExit, match="error: --repeats is 0; it must be at least 1"):
        main(["speed", "--device", "cpu", "--repeats", "0"])


def test_jobs_survive_json() -> None:
    for works in WORKS.values():
        for each in works.values():
            assert Work(**json.loads(json.dumps(asdict(each)))) == each
    for tool in TOOLS.values():
        for setting in (setting for rows in tool.values() for setting in rows):
            assert Setting(**json.loads(json.dumps(asdict(setting)))) == setting


def test_only_an_observer_that_is_asked_for_is_in_the_config_groups(work: Work) -> None:
    (plain,), (asked,) = (groups(work, Setting("a", 1, observer=each)).values() for each in (None, "minmax"))
    assert plain == QuantizationScheme(targets=["Linear"], **work.scheme)
    assert plain.weights is not None and plain.weights.observer is None
    assert asked.weights is not None and asked.weights.observer == "minmax"


def test_schemes_are_the_presets() -> None:
    for scheme, preset in ((WORKS["cuda"]["gptq"].scheme, "W4A16"), (STATIC_FP8, "FP8")):
        assert QuantizationScheme(targets=["Linear"], **scheme) == preset_name_to_scheme(preset, ["Linear"])


def test_the_model_is_the_same_each_time_and_warm_ups_are_shorter(work: Work) -> None:
    first, second = (host_model(work, None, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    model = host_model(work, None, CPU, layers=1)
    assert len(model.model.layers) == 1 and model.config._attn_implementation == "sdpa"


def test_a_checkpoint_is_loaded_or_shortened(work: Work, tmp_path: Path) -> None:
    saved = host_model(work, None, CPU)
    saved.save_pretrained(tmp_path)
    loaded = host_model(work, tmp_path, CPU)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert len(host_model(work, tmp_path, CPU, layers=1).model.layers) == 1


@torch.no_grad()
def test_inputs_that_linears_share_are_counted_once(work: Work, shapes: Shapes) -> None:
    found = shapes.distinct(2)
    assert [(tuple(each.rows.shape), tuple(each.weight.shape)) for each in found] == [
        ((64, 128), (256, 128)),  # q, k, v
        ((64, 128), (128, 128)),  # o
        ((64, 128), (512, 128)),  # gate, up
        ((64, 256), (128, 256)),  # down
    ]
    assert len(shapes.weights()) == 2 * 7


@torch.no_grad()
def test_forwards_call_every_layer_on_every_batch(shapes: Shapes) -> None:
    calls: list[tuple[int, int]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, positional, index=index: calls.append((index, len(positional[0])))
        )
        for index, layer in enumerate(shapes.layers)
    ]
    shapes.forwards(2, passes=2)
    for handle in handles:
        handle.remove()
    assert calls == [(0, 2)] * 4 + [(1, 2)] * 4


def test_statistics_of_inputs() -> None:
    rows = torch.randn(8, 5).bfloat16()
    each = Distinct(rows, torch.zeros(1, 5))
    add = hessian(each, seq_len=4, device=CPU)
    add(2)
    x = rows.double()
    torch.testing.assert_close(add(1).double(), x.T @ x + x[:4].T @ x[:4], rtol=1e-5, atol=1e-5)
    least, largest = extremes(each, seq_len=4, device=CPU)(1)  # type: ignore[misc]
    assert (least, largest) == (rows[:4].min(), rows[:4].max())


@torch.no_grad()
def test_solves_use_the_upper_factor_and_update_the_columns_after_each_block() -> None:
    torch.manual_seed(0)
    each = Distinct(torch.randn(300, 256).bfloat16(), torch.randn(4, 256).bfloat16())
    solves = Solves([each], layers=1, device=CPU)
    (upper,), (error,) = solves.uppers, solves.errors
    x = each.rows.double()
    h = x.T @ x
    h.diagonal().add_(0.01 * h.diagonal().mean())
    torch.testing.assert_close(upper.double() @ upper.double().T, h, rtol=1e-5, atol=1e-3)
    assert not upper.tril(-1).any()
    before = solves.weights[0].clone()
    solves.update()
    expected = before - torch.cat([torch.zeros(4, 128), error @ upper[:128, 128:]], 1)
    torch.testing.assert_close(solves.weights[0], expected)


def test_plain_rounding() -> None:
    weight = torch.tensor([[7.5, 3.2, 1.0, 0.0], [15.0, -15.0, 4.0, 0.9]])
    rounded = round_to_nearest(weight, 2)
    torch.testing.assert_close(
        rounded, torch.tensor([[7.0, 3.0, 0.9333, 0.0], [14.0, -16.0, 3.7333, 1.0667]]), atol=1e-3, rtol=0
    )


def test_the_fastest_number_of_samples() -> None:
    done: list[int] = []

    def work(samples: int) -> None:
        done.append(samples)
        sum(range(200_000 if samples != 2 else 10))

    assert fastest([1, 2, 4], work, CPU) == 2
    assert done == [1] * 5 + [2] * 3 + [4] * 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gptq", ["forwards", "statistics", "factorisation", "updates"]),
        ("w8a8", ["forwards", "statistics"]),
        ("rtn", ["rounding"]),
    ],
)
def test_the_floor_of_each_algorithm(name: str, parts: list[str]) -> None:
    work = WORKS["cpu"][name].tiny()
    found = floor(host_model(work, None, CPU), tokens(work, None), work, CPU, repeats=2)
    assert list(found["parts"]) == parts
    assert all(value > 0 for value in found["parts"].values())
    assert found["seconds"] == sum(found["parts"].values())
    assert set(found["samples_at_once"]) == {"forwards", "statistics"} & set(parts)


def test_a_quick_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    output.write_text(json.dumps({"works": {"fp8": {"rows": []}, "gptq": {"rows": []}}}))
    threads = str(torch.get_num_threads())
    arguments = ["--quick", "--device", "cpu", "--works", "gptq", "--settings", "batch 4", "--threads", threads]
    main(["speed", *arguments, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "| gptq | fxcalib        | batch 4 " in printed and "| floor of | forwards, s |" in printed
    works = json.loads(output.read_text())["works"]
    assert works["fp8"] == {"rows": []}  # measured by another run
    result = works["gptq"]
    assert set(result) == {"environment", "options", "work", "rows"}
    assert result["work"]["samples"] == 4 and result["environment"]["versions"]["torch"] == torch.__version__
    ours, lowest = result["rows"][0], result["rows"][-1]
    assert (ours["tool"], ours["setting"], lowest["tool"]) == ("fxcalib", "batch 4", "floor")
    assert ours["seconds"] > 0 and ours["all_seconds"] == [ours["seconds"]] and ours["peak_host_bytes"] > 2**20
    assert ours[report.OVER_FLOOR] == pytest.approx(ours["seconds"] / lowest["seconds"])


def test_what_fails_is_told_and_the_others_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    monkeypatch.setitem(TOOLS, "fxcalib", {"cpu": (Setting("odd", 1, {"offload": "nowhere"}),)})
    result = command.compare("gptq", work, Options("cpu", torch.get_num_threads()), tool="fxcalib")
    (row,) = result["rows"]
    assert row["seconds"] is None and "fxcalib failed with status 1" in row["error"] and "nowhere" in row["error"]
    assert "nowhere" in capsys.readouterr().err


def test_every_algorithm_runs_in_a_worker(work: Work) -> None:
    options = Options("cpu", torch.get_num_threads(), repeats=2, warm_up=False)
    for name in ("w8a8", "rtn"):
        measured = measure("fxcalib", WORKS["cpu"][name].tiny(), Setting("batch 2", 2), options)
        assert measured["seconds"] == min(measured["all_seconds"]) and len(measured["all_seconds"]) == 2
