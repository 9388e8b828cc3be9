"""A headless Chromium, views of tiny models, and a PATH without Graphviz."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from batches import token_batch
from hostile import EVIL
from tiny_llama import tiny_llama

from fxcalib.modifiers.base import ModuleResult
from fxcalib.partitioning import Partition, partition
from fxcalib.report import Report, SubgraphReport
from fxcalib.tracing import trace


@pytest.fixture(scope="session")
def llama() -> Partition:
    """Six decoder layers with an unpadded batch of 2 x 16 tokens."""
    model = tiny_llama(num_hidden_layers=6)
    return partition(trace(model, token_batch(2, 16, use_cache=False)))


@pytest.fixture(scope="session")
def report(llama: Partition) -> Report:
    """What a run over that model would have reported, with a name that tries to break out of its table."""
    subgraphs = tuple(SubgraphReport(s.index, s.targets, 0.5, 0.25 * s.index, 0.125) for s in llama if s.targets)
    modules = tuple(
        ModuleResult(f"{name}.mlp.{part}_proj", EVIL, 0.001 * (k + 1), "output", 0.01 * (k + 1), ("damping raised",))
        for k, name in enumerate(llama.traced.targets.names)
        for part in ("up", "down")
    )
    return Report(
        model="tiny",
        pipeline="sequential",
        algorithm="gptq",
        scheme="W4A16",
        subgraphs=subgraphs,
        modules=modules,
        seconds=12.5,
        timings={},
        tokens=4096,
        samples=8,
        batches=4,
        passes=13,
        retraces=0,
        peak_host_bytes=1 << 30,
        peak_device_bytes=0,
        seed=0,
        data={},
        versions={},
        warnings=(EVIL,),
    )


@pytest.fixture
def without_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program of the system can be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("dot") is None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Chromium, driven by its own chromedriver; skipped where it is not installed, unless it has to be."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "needs chromium and chromedriver (apt-get install chromium chromium-driver)"
        if os.environ.get("FXCALIB_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
