from __future__ import annotations

import time

import pytest
import torch
from test_pipelines import MIXED, gptq
from tiny_llama import tiny_llama

from fxcalib import calibrate
from fxcalib.profiling import Profile, profiling, span
from fxcalib.report import WORK, Report


def test_every_moment_belongs_to_one_kind() -> None:
    profile = Profile(torch.device("cpu"))
    began = time.perf_counter()
    with profiling(profile):
        with span("forward"):
            time.sleep(0.02)
            with span("statistics"):
                time.sleep(0.01)
            time.sleep(0.02)
        with span("solve"):
            time.sleep(0.01)
    with span("forward"):  # nobody listens
        time.sleep(0.01)
    found = profile.seconds()
    assert sum(found.values()) == pytest.approx(time.perf_counter() - began, rel=0.05)
    assert found["forward"] > found["statistics"] and found["solve"] > 0 and found["other"] > 0.009
    assert found.keys() <= WORK.keys()


def test_a_calibration_says_where_its_time_went() -> None:
    report = calibrate(tiny_llama(), MIXED, gptq(), profile=True)
    assert report.profile.keys() == {"trace", "data", "forward", "statistics", "solve", "copies", "other"}
    assert sum(report.profile.values()) == pytest.approx(report.timings["calibrate"], rel=0.05)
    assert "forward (running the model)" in str(report) and "100%" in str(report)
    assert Report.from_dict(report.to_dict()).profile == report.profile
    assert not calibrate(tiny_llama(), MIXED, gptq()).profile
