"""`fxcalib trace`: what it reports, what it explains, and its exit codes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from batches import token_batch
from glue_models import save_remote_model
from tiny_llama import save_tiny_llama, tiny_llama
from torch import nn
from typer.testing import CliRunner

from fxcalib import cli, partition, trace
from fxcalib.trace_report import report_of
from fxcalib.verification import compare, verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(path)
    return path


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model whose own code cannot be traced."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return save_remote_model(tmp_path / "odd")


def _run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, ["trace", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def test_the_report_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    out, _ = _run(bare, "--seq-len", 16)
    lines = out.splitlines()
    assert lines[0].startswith("bare (LlamaForCausalLM) is traced in ")
    assert lines[0].endswith("on a batch of input_ids 2x16, attention_mask 2x16")
    assert lines[1] == "targets    LlamaDecoderLayer: 2 modules, model.layers.0, model.layers.1"
    assert lines[2] == "nodes      6 module calls, 12 operations of glue between them"
    assert lines[3] == "subgraphs  3"
    assert "  1: model.layers.1: 1 module call, " in out
    assert "  2: what follows: 2 module calls, " in out
    assert "  [constant] use_cache == False" in lines
    assert "masking_utils.py:" in out
    assert lines[-1] == "exact      not looked at: --verify loads the weights and compares with the model"


def test_verify_compares_batches_of_two_sizes(folder: Path) -> None:
    out, _ = _run(folder, "--verify", "--seq-len", 16, "--targets", "Linear")
    assert "exact      input_ids 2x16, attention_mask 2x16: bit for bit as the model" in out
    assert "exact      input_ids 3x12, attention_mask 3x12: bit for bit as the model" in out


def test_a_batch_of_ones_own_as_json(folder: Path, tmp_path: Path) -> None:
    torch.save(token_batch(2, 12, left=3, use_cache=False), tmp_path / "batch.pt")
    out, _ = _run(folder, "--batch", tmp_path / "batch.pt", "--verify", "--json")
    found = json.loads(out)
    assert found["traced"] is True
    assert [line["targets"] for line in found["subgraphs"]] == [["model.layers.0"], ["model.layers.1"], []]
    assert [(c["identical"], c["differences"]) for c in found["verified"]] == [(True, []), (True, [])]
    assert {guard["kind"] for guard in found["guards"]} == {"shape", "constant", "value"}


def test_a_model_that_cannot_be_traced_is_explained(remote: Path) -> None:
    _, err = _run(remote, "--trust-remote-code", code=1)
    assert "error: OddModel cannot be traced: data that leaves torch" in err
    assert "modeling_odd.py:" in err
    assert "in places: return torch.from_numpy(np.cumsum(mask.numpy(), -1))" in err
    assert "mask: int64[attention_mask_0, attention_mask_1]" in err
    assert "import places" in err
    assert "fxcalib.wrap(places)" in err
    out, err = _run(remote, "--trust-remote-code", "--verify", "--json", code=1)
    found = json.loads(out)
    assert found["traced"] is False
    assert found["patch_suffices"] is True
    assert found["calls"][-1]["function"] == "places"


@pytest.mark.filterwarnings("default:the model cannot be traced:UserWarning")
def test_quantize_names_what_works_without_a_trace(remote: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + i % 100}" for i in range(200)))
    common = [remote, "--trust-remote-code", "--data", text, "--samples", 4, "--seq-len", 8, "--scheme", "W8A16"]
    arguments = ["quantize", *map(str, common), "--group-size", "16", "-o", str(tmp_path / "out"), "-q"]
    result = CliRunner().invoke(cli.app, [*arguments, "--pipeline", "sequential"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "fxcalib quantize --pipeline layer_sequential --suspended" in said
    assert "fxcalib.wrap" in said
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli.app, arguments[:-1])
    assert result.exit_code == 0
    assert "its own forwards are suspended at each layer instead" in " ".join(result.stderr.split())
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    assert "did you mean 'LlamaDecoderLayer'" in _run(folder, "--targets", "LlamaDecoderLayr", code=2)[1]
    assert "cannot be read" in _run(folder, "--batch", tmp_path / "none.pt", code=2)[1]
    torch.save({"input_ids": torch.full((1, 4), 10**6)}, tmp_path / "far.pt")
    said = " ".join(_run(folder, "--batch", tmp_path / "far.pt", "--verify", code=2)[1].split())
    assert "LlamaForCausalLM itself fails on this batch" in said


class Counting(nn.Module):
    """Adds how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(input) + self.calls


def test_a_difference_is_noticed() -> None:
    model = tiny_llama()
    given = token_batch(2, 8, use_cache=False)
    parts = partition(trace(model, given))
    assert all(found.identical for found in verify(parts, given))
    model.model.norm = copy.deepcopy(model.model.norm)  # the subgraphs go on with the other one
    model.model.norm.weight.data[0] *= 1.001
    found = compare(parts, given)
    assert not found.identical
    assert "logits differs in " in str(found)
    report = report_of(parts, "tiny", "x 1x1", (found,))
    assert not report.exact
    assert "WRONG" in str(report)


def test_state_is_put_back_before_the_subgraphs_run() -> None:
    model = nn.Sequential(Counting(), Counting())
    parts = partition(trace(model, {"input": torch.ones(2, 4)}, "Counting"))
    assert compare(parts, {"input": torch.ones(2, 4)}).identical
    assert model[0].calls == 0
