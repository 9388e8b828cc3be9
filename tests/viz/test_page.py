"""The page in a real browser: it draws, finds, opens, obeys the keyboard, and nothing in it comes from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import token_batch
from hostile import EVIL
from tiny_llama import tiny_llama
from torch import nn

from fxcalib import viz
from fxcalib.partitioning import Partition, partition
from fxcalib.report import Report
from fxcalib.tracing import TraceError, trace
from fxcalib.viz.page import embedded_json

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def page(llama: Partition, report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "graph.html"
    memory = viz.predict_memory(llama, token_batch(2, 16, use_cache=False), samples=8, device="cpu")
    return viz.save(viz.describe(llama, report, name=EVIL, memory=memory), path)


@pytest.fixture
def open_page(browser: Any, page: Path) -> Open:
    def opened(path: Path = page, dark: bool = False) -> Any:
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        browser.get(path.as_uri())
        return browser

    return opened


def _one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def _all(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements("css selector", selector))


def _no_complaints(browser: Any) -> None:
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert browser.execute_script("return window.broken === undefined")


def _type(browser: Any, *keys: str) -> None:
    browser.switch_to.active_element.send_keys(*keys)


def test_it_is_one_file_and_escapes_what_the_model_says(page: Path) -> None:
    text = page.read_text()
    assert "%{" not in text
    assert EVIL not in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|\#)""", text)
    assert re.findall(r"https?://[^\s\"']+", text.replace("http://www.w3.org/", "")) == []
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    assert json.loads(found[1])["model"] == EVIL


def test_json_in_a_script_element_cannot_leave_it() -> None:
    text = embedded_json({"a": "</script><!--&"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&"}


def test_it_renders_and_says_what_it_shows(open_page: Open) -> None:
    browser = open_page()
    assert _one(browser, "#title").text == EVIL
    assert "7 subgraphs" in _one(browser, "#facts").text
    assert len(_all(browser, "#picture g.subgraph")) == 3  # 0, 1 … 5 folded, 6
    shown = _one(browser, "#picture > svg").rect
    assert shown["width"] > 400
    assert shown["height"] > 400
    assert len(_all(browser, "#timeline .bar")) == 17  # three steps a layer, the last one propagates nothing
    assert _one(browser, "#timeline h3").text == (
        "Predicted host memory of each step of GPTQ to W4A16 in groups of 64 on cpu, 8 samples"
    )
    legend = [part.text for part in _all(browser, "#timeline .legend span")]
    assert legend == ["weights", "batches", "stored", "statistics", "working"]
    _no_complaints(browser)


def test_a_click_opens_the_table_of_a_subgraph(open_page: Open) -> None:
    browser = open_page()
    _one(browser, "#subgraph-0 text").click()
    details = _one(browser, "#details").text
    for part in ("Subgraph 0", "model.embed_tokens", "LlamaDecoderLayer", "Frees", "Glue operations"):
        assert part in details
    assert "aten.arange" in details
    assert re.search(r"modeling_llama\.py:\d+", details)
    assert "damping" not in details  # a note is a tooltip
    assert "model.layers.0.mlp.up_proj" in details
    assert "1.00e-3" in details
    _one(browser, "#close").click()
    assert "Subgraphs" in _one(browser, "#details h2").text
    _no_complaints(browser)


def test_a_folded_cluster_lets_one_choose_among_the_same(open_page: Open) -> None:
    from selenium.webdriver.support.select import Select

    browser = open_page()
    _one(browser, "#subgraph-1 text").click()
    chooser = Select(_one(browser, "#member"))
    assert [o.text for o in chooser.options] == [f"subgraph {k}" for k in range(1, 6)]
    chooser.select_by_index(3)
    assert "model.layers.4" in _one(browser, "#details").text
    assert "open" in _one(browser, "#subgraph-1").get_attribute("class")
    _no_complaints(browser)


def test_search_finds_and_marks(open_page: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page()
    _type(browser, "/")
    _type(browser, "layers_4")
    assert _one(browser, "#results p").text == "1 found"
    assert [e.get_attribute("class") for e in _all(browser, "#picture .hit")] == ["node target hit"]
    _type(browser, Keys.ENTER)
    assert "model.layers.4" in _one(browser, "#details").text
    _type(browser, Keys.ESCAPE)
    assert _all(browser, "#picture .hit") == []
    assert _one(browser, "#search").get_attribute("value") == ""
    _type(browser, "/")
    _type(browser, "layers.4.mlp.up_proj")
    assert _one(browser, "#results p").text == "1 found"
    assert [e.get_attribute("class") for e in _all(browser, "#picture .hit")] == ["node target hit"]
    assert "Linear" in _one(browser, "#results button").text
    _type(browser, Keys.ENTER)
    assert "model.layers.4" in _one(browser, "#details").text
    _type(browser, Keys.ESCAPE)
    _type(browser, "/")
    _type(browser, "no such thing")
    assert _one(browser, "#results p").text == "0 found"
    _no_complaints(browser)


def test_the_keyboard_reaches_everything(open_page: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page()
    reached = []
    for _ in range(9):
        _type(browser, Keys.TAB)
        reached.append(browser.switch_to.active_element.get_attribute("id"))
    picture = ["", "subgraph-0", "subgraph-1", "subgraph-6"]
    assert reached == ["search", "zoom-in", "zoom-out", "fit", "theme", *picture]
    _type(browser, Keys.ENTER)
    assert "Subgraph 6" in _one(browser, "#details h2").text
    assert browser.switch_to.active_element.get_attribute("id") == "close"
    _type(browser, Keys.ESCAPE)
    assert browser.switch_to.active_element.get_attribute("id") == "subgraph-6"
    _one(browser, "#timeline .bar").send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("aria-label").startswith("step 1: commit")
    _type(browser, Keys.ENTER)
    assert "Subgraph 0" in _one(browser, "#details h2").text
    _no_complaints(browser)


def test_zoom_and_pan_move_the_picture(open_page: Open) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = open_page()

    def view_box() -> list[float]:
        return [float(x) for x in _one(browser, "#picture > svg").get_dom_attribute("viewBox").split()]

    _one(browser, "#fit").click()
    whole = view_box()
    _one(browser, "#zoom-in").click()
    assert view_box()[2] == pytest.approx(0.75 * whole[2])
    picture = _one(browser, "#picture")
    ActionChains(browser).move_to_element(picture).click_and_hold().move_by_offset(80, 40).release().perform()
    assert view_box()[0] < whole[0] + whole[2] * 0.125
    assert "Subgraphs" in _one(browser, "#details h2").text  # a drag is no click
    _one(browser, "#subgraph-0").send_keys("0")
    assert view_box() == whole
    before = view_box()
    _one(browser, "#subgraph-0").send_keys(Keys.ARROW_DOWN)
    assert view_box()[1] > before[1]
    _no_complaints(browser)


def test_light_and_dark(open_page: Open, tmp_path: Path) -> None:
    def paper(browser: Any) -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    browser = open_page(dark=True)
    assert paper(browser) == "rgb(20, 24, 29)"
    fill = _one(browser, "#subgraph-0 path").value_of_css_property("fill")
    assert fill == "rgb(27, 33, 41)"
    _one(browser, "#theme").click()
    assert paper(browser) == "rgb(255, 255, 255)"
    assert paper(open_page(dark=False)) == "rgb(255, 255, 255)"
    _no_complaints(browser)


def test_a_run_is_plotted(open_page: Open) -> None:
    browser = open_page()
    assert "12.5 s" in _one(browser, "#run").text
    assert [h.text for h in _all(browser, ".plots h3")] == [
        "Time of each subgraph",
        "Error of each module (relative, squared)",
        "Time of each module",
    ]
    assert len(_all(browser, ".plots > div:nth-child(2) .bar")) == 12
    _no_complaints(browser)


class _Stuck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        if x.sum() > 0:
            x = x + 1
        return self.head(x)


def test_the_page_of_an_untraceable_model(open_page: Open, tmp_path: Path) -> None:
    import torch
    from selenium.webdriver.common.keys import Keys

    with torch.device("meta"):  # no value can be known
        model = _Stuck()
    with pytest.raises(TraceError) as caught:
        trace(model, {"x": torch.zeros(2, 4)}, ["Linear"])
    path = viz.save(viz.describe_failure(model, caught.value), tmp_path / "stuck.html")
    browser = open_page(path)
    assert "x.sum() > 0" in _one(browser, "#details").text
    assert len(_all(browser, "#picture .failing")) == 1
    _type(browser, "/")
    _type(browser, "head")
    assert _one(browser, "#results p").text == "1 found"
    assert len(_all(browser, "#picture .hit")) == 1
    assert [row.text.split()[0] for row in _all(browser, "#details tbody tr") if row.is_displayed()] == ["head"]
    _type(browser, Keys.ESCAPE)
    assert _all(browser, "#picture .hit") == []
    assert all(row.is_displayed() for row in _all(browser, "#details tbody tr"))
    _no_complaints(browser)


def test_numbers_of_subgraphs_do_not_wrap(browser: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=11)
    parts = partition(trace(model, token_batch(1, 8, use_cache=False)))
    browser.get(viz.save(viz.describe(parts), tmp_path / "many.html").as_uri())
    heights = {button.text: button.size["height"] for button in _all(browser, "#details [data-open]")}
    assert heights["10"] == heights["9"]
