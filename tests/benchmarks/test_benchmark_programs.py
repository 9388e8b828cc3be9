"""What the benchmarks are made of, without the network and without measuring."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import environment, gptq, overhead, texts, tracing_time, wheels
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.results import markdown, save
from fxcalib.modifiers.base import Scope


def test_the_command_lists_all_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, line in BENCHMARKS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", printed, flags=re.MULTILINE)
    assert len(printed.splitlines()) < 25


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_has_a_quick_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["overhaed"])
    assert caught.value.code == 2
    assert "'overhaed'" in capsys.readouterr().err


def test_wiki_markup_becomes_prose() -> None:
    source = """{{Infobox | a = {{nested|x}} }}
'''Anarchism''' is a [[political philosophy|philosophy]] of [[self-governance]] by ''voluntary'' institutions.<ref
name="a">A {{cite}} here.</ref><ref name="b" />  It has [http://example.org many forms]<!-- hidden
text -->, though not all.
[[File:flag.png|thumb|A [[flag]] of the [[movement]] which is a long enough caption to look like prose]]
== History ==
* a list item that is certainly long enough to be taken for a paragraph
{| class="wikitable"
| a cell of a table that is certainly long enough to be taken for a paragraph
|}
The term is a compound of ''an-'' ({{lang|el|x}}) &amp; ''arkhos'', with<br />a break that is left out.
[[Category:Anarchism]]"""
    assert texts.plain_text(source).split("\n\n") == [
        "Anarchism is a philosophy of self-governance by voluntary institutions. It has many forms, though not all.",
        "The term is a compound of an- & arkhos, with a break that is left out.",
    ]


def test_texts_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCALIB_CACHE", str(tmp_path / "cache"))
    assert wheels.cache_folder() == tmp_path / "cache"
    (tmp_path / "cache" / texts.NEWS).write_text("first article\n\nsecond article\n")
    assert texts.news() == ["first article", "second article"]


def test_the_environment_names_hardware_and_versions_but_no_machine() -> None:
    found = environment.environment(threads=2)
    text = json.dumps(found)
    assert found["threads"] == 2
    assert isinstance(found["versions"], dict) and found["versions"]["torch"] == torch.__version__
    assert isinstance(found["cores"], int) and found["cores"] >= 1
    assert os.uname().nodename not in text and str(Path.home()) not in text


@pytest.mark.parametrize(("load", "warns"), [(0.0, False), (0.3, False), (1.5, True), (None, False)])
def test_a_busy_machine_is_warned_about(load: float | None, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "load_average", lambda: load)
    warning = environment.idle_warning()
    assert (warning is not None) == warns
    if warning is not None:
        assert "load average is 1.50" in warning


def test_results_as_a_table_and_as_json(tmp_path: Path) -> None:
    rows = [{"tool": "a", "seconds": 81.234, "KL": 0.27361}, {"tool": "long name", "seconds": 1234.5, "KL": None}]
    assert markdown(rows) == (
        "| tool      | seconds | KL    |\n"
        "|-----------|---------|-------|\n"
        "| a         | 81.2    | 0.274 |\n"
        "| long name | 1234    | -     |"
    )
    save(tmp_path / "results" / "x.json", {"rows": rows})
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == {"rows": rows}


def test_the_tables_of_both_benchmarks() -> None:
    walk = {"calibration": [2.2, 2.1, 2.4], "two_forwards": [2.1, 2.0, 2.0], "same_work": [1.8, 1.9, 1.7]}
    first, _, *rows = overhead.table(walk).splitlines()
    assert [cell.strip() for cell in rows[1].split("|")[1:-1]] == ["two plain forwards", "2", "2", "1.05", "1.1"]
    assert first.count("|") == rows[1].count("|")
    row = {
        "tool": "fxcalib",
        "seconds": 45.0,
        "before_bytes": 2**30,
        "peak_bytes": 3 * 2**29,
        "perplexity": 25.0,
        "reference_perplexity": 20.0,
        "kl": 0.25,
    }
    cells = gptq.table({"rows": [row]}).splitlines()[2].split("|")[1:-1]
    assert [cell.strip() for cell in cells] == ["fxcalib", "45", "1.5", "1", "25", "20", "0.25"]


def test_tracing_time_of_two_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tracing_time", "--quick"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header, _, layers, linears = [row for row in rows if len(row) > 1]
    assert header == ["model", "targets", "seconds", "tracing, s", "partitioning, s", "nodes", "subgraphs"]
    assert (layers[1], layers[-1]) == ("layers", "3")
    assert (linears[1], linears[-1]) == ("Linear", "15")
    assert int(layers[5]) < int(linears[5])


def test_tracing_time_measures_what_it_says() -> None:
    assert [case.settings["num_hidden_layers"] for case in tracing_time.DEPTHS] == [8, 16, 32, 64]
    assert len({str({**case.settings, "num_hidden_layers": 0}) for case in tracing_time.DEPTHS}) == 1
    model = tracing_time.build(tracing_time.QUICK[0])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.model.layers) == 2


def test_the_idle_modifier_observes_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    modifier = overhead.IdleModifier()
    modifier.attach(model)
    assert modifier.needs.observed == modifier.needs.committed == {"0", "2"}
    scope = Scope(model=model, index=0, modules={"0": model[0], "1": model[1]})
    with modifier.observe(scope):
        assert [len(module._forward_pre_hooks) for module in model] == [1, 0, 0]
    assert not any(module._forward_pre_hooks for module in model)
    assert modifier.commit(scope) == []
