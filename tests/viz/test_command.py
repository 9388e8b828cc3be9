"""`fxcalib graph`: every kind of file, with Graphviz and without it, and what is said when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from batches import token_batch
from tiny_llama import save_tiny_llama, tiny_llama
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from fxcalib import cli, viz
from fxcalib.errors import BatchError, OutputError, RendererError
from fxcalib.partitioning import Partition
from fxcalib.report import Report
from fxcalib.viz import rendering

SIGNATURES = {
    "svg": b"<?xml",
    "png": b"\x89PNG\r\n",
    "pdf": b"%PDF-",
    "dot": b"digraph",
    "json": b"{",
    "html": b"<!DOC",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and no weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(path)
    (path / "model.safetensors").unlink()
    return path


def _run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, ["graph", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, " ".join(result.stderr.split())


@pytest.mark.parametrize("ending", viz.FORMATS)
def test_every_kind_of_file_with_dot(llama: Partition, tmp_path: Path, ending: str) -> None:
    if shutil.which("dot") is None:
        pytest.skip("needs the program dot (apt-get install graphviz)")
    path = viz.save(viz.describe(llama), tmp_path / f"graph.{ending}")
    assert path.read_bytes().startswith(SIGNATURES[ending])
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", viz.FORMATS)
def test_every_kind_of_file_without_dot(llama: Partition, tmp_path: Path, without_dot: None, ending: str) -> None:
    path = tmp_path / f"graph.{ending}"
    viz.save(viz.describe(llama), path)
    assert path.read_bytes().startswith(SIGNATURES[ending])


def test_a_missing_renderer_names_what_to_install(
    llama: Partition, tmp_path: Path, without_dot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "WHEEL", "no-such-distribution")
    with pytest.raises(RendererError, match=r"needs Graphviz, .* `pip install 'fxcalib\[graph\]'`"):
        viz.save(viz.describe(llama), tmp_path / "graph.svg")
    assert list(tmp_path.iterdir()) == []
    viz.save(viz.describe(llama), tmp_path / "graph.dot")


def test_both_renderers_draw_the_same_nodes(llama: Partition, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dot = viz.to_dot(viz.describe(llama))
    with_dot = viz.render(dot, "svg").decode()
    monkeypatch.setenv("PATH", str(tmp_path))
    without = viz.render(dot, "svg").decode()
    for text in (with_dot, without):
        assert text.count('class="node') == dot.count("class=target") + sum(
            dot.count(f"class={kind}]") + dot.count(f"class={kind} ") for kind in ("module", "glue", "input", "tag")
        )
        assert re.search(r'<g [^>]*class="cluster subgraph folded"', text)
        assert 'id="subgraph&#45;1"' in text


def test_the_command_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    out, _ = _run(folder, "-o", tmp_path / "graph.json", "--seq-len", 32, "--batch-size", 3)
    assert out == f"The graph is in {tmp_path / 'graph.json'}\n"
    data = json.loads((tmp_path / "graph.json").read_text())
    assert data["model"] == "tiny"
    assert data["sizes"]["batch"] == 3
    assert data["sizes"]["sequence"] == 32
    assert [len(s["targets"]) for s in data["subgraphs"]] == [1, 1, 0]


def test_targets_and_a_batch_of_ones_own(folder: Path, tmp_path: Path) -> None:
    torch.save(token_batch(2, 12, left=3, use_cache=False), tmp_path / "batch.pt")
    path = tmp_path / "graph.json"
    _run(folder, "-o", path, "--batch", tmp_path / "batch.pt", "--targets", "Linear", "--targets-per-subgraph", 7)
    data = json.loads(path.read_text())
    assert [len(s["targets"]) for s in data["subgraphs"]] == [7, 7, 1]
    assert "aten.index.Tensor" in {n["name"] for n in data["nodes"]}  # the mask of a padded batch


def test_a_report_is_shown(folder: Path, tmp_path: Path, report: Report) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    _run(folder, "-o", tmp_path / "graph.json", "--report", tmp_path / "report.json")
    data = json.loads((tmp_path / "graph.json").read_text())
    assert data["run"]["seconds"] == 12.5
    assert data["subgraphs"][1]["measured"]["modules"][0]["error"] == 0.002


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "graph.svgg"], "'graph.svgg' ends in .svgg, which is no kind of picture: did you mean 'svg'?"),
        (["-o", "graph"], "'graph' has no ending, which is no kind of picture: choose from dot, html, json, pdf"),
        (["-o", "no/graph.svg"], "its folder 'no' does not exist; make it"),
        (["-o", "graph.svg", "--report", "no.json"], "report 'no.json' cannot be read: No such file"),
        (["-o", "graph.svg", "--batch", "no.pt"], "batch file 'no.pt' cannot be read: "),
        (["-o", "graph.svg", "--targets", "LlamaLayer"], "'LlamaLayer' matches no module"),
    ],
)
def test_bad_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _, said = _run(folder, *arguments, code=2)
    assert text in said
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[1]")
    _, said = _run(folder, "-o", tmp_path / "g.svg", "--report", tmp_path / "report.json", code=2)
    assert "is no report of fxcalib" in said
    torch.save([1], tmp_path / "batch.pt")
    _, said = _run(folder, "-o", tmp_path / "g.svg", "--batch", tmp_path / "batch.pt", code=2)
    assert "holds a list, not a dict of the model's keyword arguments" in said
    torch.save({"x": nn.Linear(1, 1)}, tmp_path / "code.pt")
    _, said = _run(folder, "-o", tmp_path / "g.svg", "--batch", tmp_path / "code.pt", code=2)
    assert "cannot be read: " in said


def test_a_failed_write_leaves_the_old_file(llama: Partition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=r"graph\.json' cannot be written: No space left on device"):
        viz.save(viz.describe(llama), path)
    assert path.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["graph.json"]


@pytest.mark.parametrize("ending", ["svg", "json", "html"])
def test_an_untraceable_model_is_drawn_as_a_tree(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    def stuck(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if hidden.sum() > 0 else -hidden

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", stuck)
    path = tmp_path / f"graph.{ending}"
    _, said = _run(folder, "-o", path, "--targets", "Linear", code=1)
    assert "branches on data" in said
    assert "hidden.sum() > 0" in said
    text = path.read_text()
    assert "hidden.sum()" in text
    if ending == "json":
        data = json.loads(text)
        assert [n["name"] for n in data["nodes"] if n["failing"]] == ["model.layers.0.mlp"]
        assert [n["count"] for n in data["nodes"] if n["type"] == "LlamaDecoderLayer"] == [1, 1]


def test_names_cannot_break_out_of_labels() -> None:
    model = nn.Module()
    model.add_module('a"><b>&\\n', nn.Linear(2, 2))
    model.forward = lambda x: getattr(model, 'a"><b>&\\n')(x)  # type: ignore[method-assign]
    from fxcalib.partitioning import partition
    from fxcalib.tracing import trace

    view = viz.describe(partition(trace(model, {"x": torch.zeros(1, 2)}, ["Linear"])))
    svg = viz.render(viz.to_dot(view), "svg").decode()
    assert "&lt;b&gt;&amp;" in svg


class TestSampleBatches:
    def test_text(self) -> None:
        batch = viz.sample_batch(tiny_llama(), batch=3, sequence=500)
        assert batch["input_ids"].shape == (3, 64)  # what the model has positions for
        assert batch["attention_mask"].all()
        assert batch["use_cache"] is False

    def test_encoder_decoder(self) -> None:
        with torch.device("meta"):
            model = T5ForConditionalGeneration(T5Config(num_layers=1))
        assert viz.sample_batch(model, sequence=16)["decoder_input_ids"].shape == (1, 16)

    def test_image_tokens_match_the_image(self) -> None:
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
        text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
        with torch.device("meta"):
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text))
        batch = viz.sample_batch(model, sequence=100)
        assert batch["image_grid_thw"].tolist() == [[1, 16, 16]]
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 64

    def test_image_and_text(self) -> None:
        with torch.device("meta"):
            model = BlipForConditionalGeneration(BlipConfig())
        assert set(viz.sample_batch(model)) == {"pixel_values", "input_ids", "attention_mask", "use_cache"}

    def test_what_is_no_transformers_model(self) -> None:
        with pytest.raises(BatchError, match=r"Linear has no transformers config .* give --batch"):
            viz.sample_batch(nn.Linear(1, 1))


def test_dtype_of_the_config_is_that_of_the_skeleton(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "half"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    _run(other, "-o", tmp_path / "graph.json")
    data = json.loads((tmp_path / "graph.json").read_text())
    full = tiny_llama()
    assert data["bytes"] < 0.6 * sum(p.numel() * 4 for p in full.parameters())
