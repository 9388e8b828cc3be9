"""The command line: quick to answer, results on standard output, everything else on standard error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from tiny_llama import VOCABULARY, save_tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fxcalib import cli, embedded
from fxcalib.cli.run_options import RunOptions, default_output
from fxcalib.cli.running import reported
from fxcalib.cli.words import gathered, names
from fxcalib.display import Pace, RichProgress
from fxcalib.modifiers.base import ModuleResult

HEAVY = ("torch", "transformers", "compressed_tensors", "datasets", "networkx")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a tiny model in `tiny` and some text in `words.txt`."""
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(" ".join(f"w{3 + i * i % (VOCABULARY - 3)}" for i in range(2000)))
    return tmp_path


def _run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, fxcalib.cli\n"
        "try:\n    fxcalib.cli.main()\n"
        f"finally:\n    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["quantize", "--help"], ["eval", "--help"], ["trace", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]", arguments


def test_lists_of_names_need_no_commas_behind_the_model() -> None:
    given = ["quantize", "tiny", "--ignore", "lm_head", "re:.*up_proj", "--targets", "A", "B", "-o", "out"]
    expected = [
        "quantize",
        "tiny",
        "--ignore",
        "lm_head",
        "--ignore",
        "re:.*up_proj",
        "--targets",
        "A",
        "--targets",
        "B",
        "-o",
        "out",
    ]
    assert gathered(given) == expected


@pytest.mark.parametrize("model", ["tiny", "./elsewhere", "owner/name"])
def test_a_model_behind_a_name_is_told_by_its_look(work: Path, model: str) -> None:
    given = ["quantize", "--ignore", "lm_head", model, "--json"]
    assert gathered(given) == given
    given = ["quantize", "--ignore=lm_head", model, "--targets", "A", "B"]
    assert gathered(given) == [*given[:-1], "--targets", "B"]


def test_names_without_a_model_are_never_taken_for_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fxcalib", "quantize", "--ignore", "lm_head", "gate"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == cli.BAD_INPUT
    assert capsys.readouterr().err == (
        "error: 'gate' behind --ignore may be another name or MODEL, as MODEL does not come first; write "
        "fxcalib quantize MODEL --ignore NAME NAME, or separate the names by commas\n"
    )


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the time of one child process")
def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "fxcalib", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        seconds.append(usage.ru_utime + usage.ru_stime)  # not the wall time, which says more about the machine's load
    assert min(seconds) < 0.5


def test_version_and_help_texts() -> None:
    assert _run("--version")[0].startswith("fxcalib ")
    shown = _run("quantize", "--help")[0]
    for text in ("--group-size", "--ignore", "What to do", "How it runs", "Examples", "--json"):
        assert text in shown


def test_unknown_options_offer_the_nearest() -> None:
    _, errors = _run("quantize", "--group-sise", "64", code=2)
    assert "--group-size" in errors


def test_eval(work: Path) -> None:
    out, errors = _run("eval", "tiny", "--data", "words.txt", "--seq-len", "32", "--samples", "4", "--json")
    result = json.loads(out)
    assert result["tokens"] == 128
    assert result["kl"] is None
    assert 50 < result["perplexity"] < 300  # random weights: about the size of the vocabulary
    assert "evaluate" in errors
    out, errors = _run(
        "eval", "tiny", "--reference", "tiny", "--data", "words.txt", "--seq-len", "32", "--samples", "4", "--quiet"
    )
    assert out.startswith("perplexity ")
    assert "KL to the reference 0.0000 nats" in out
    assert errors == ""


def test_bad_input_is_one_message_and_code_2(work: Path) -> None:
    out, errors = _run("eval", "./tyni", "--json", code=2)
    assert out == ""
    assert "error: model folder './tyni' does not exist; did you mean 'tiny'?" in errors
    assert "Traceback" not in errors
    result = CliRunner().invoke(cli.app, ["eval", "./tyni", "--debug"])
    assert type(result.exception).__name__ == "ModelError"


def test_interrupt_is_code_130() -> None:
    with pytest.raises(typer.Exit) as stopped, reported(debug=False, quiet=True, as_json=False):
        raise KeyboardInterrupt
    assert stopped.value.exit_code == 130


def test_names_are_split_at_commas_but_patterns_are_not() -> None:
    assert names(["a,b", "re:x{1,2}", "c"]) == ["a", "b", "re:x{1,2}", "c"]
    assert names(None) is None


def test_default_output() -> None:
    assert str(default_output("HuggingFaceTB/SmolLM2-135M-Instruct", "W4A16")) == "SmolLM2-135M-Instruct-W4A16"
    assert str(default_output("./models/tiny/", "FP8")) == "tiny-FP8"
    assert str(RunOptions().default_output("a/tiny")) == "tiny-W4A16"
    assert str(RunOptions(algorithm="wanda").default_output("a/tiny")) == "tiny-wanda"
    assert str(RunOptions(recipe=Path("x/mixed.yaml")).default_output("a/tiny")) == "tiny-mixed"


def test_quantize(work: Path) -> None:
    out, errors = _run(
        *("quantize", "tiny", "--group-size", "32", "--data", "words.txt", "--samples", "4", "--seq-len", "32"),
        *("--eval", "--json", "--device", "cpu"),
    )
    assert out.count("\n") == 1
    result = json.loads(out)
    assert Path(result["output"]).resolve() == work / "tiny-W4A16"
    assert result["tokens"] == 128
    assert result["subgraphs"] >= 2
    assert result["modules"] == 14
    assert result["perplexity_before"] != result["perplexity_after"]
    assert result["peak_host_bytes"] > 0
    assert "calibrate" in errors
    assert AutoModelForCausalLM.from_pretrained("tiny-W4A16").config.quantization_config is not None
    _, errors = _run("quantize", "tiny", "--group-size", "32", "--data", "words.txt", code=2)
    assert "is not empty; give a new one or pass --overwrite" in errors
    assert json.loads(_run("eval", "tiny-W4A16", "--data", "words.txt", "--seq-len", "32", "--json")[0])["tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--algorithm", "gtpq"], "did you mean 'gptq'?"),
        (["tiny", "--scheme", "W4A61"], "W4A16"),
        (["tiny", "--pipeline", "sequental"], "sequential"),
        (["tiny", "--offload", "gpu"], "gpu"),
        (["tiny", "--group-size", "48"], "48"),
        (["tiny", "--ignore", "lm_haed"], "lm_head"),
        (["tiny", "--targets", "LlamaDecoderLayr"], "LlamaDecoderLayer"),
        (["tiny", "--samples", "100000"], "samples"),
        (["./missing"], "does not exist"),
        (["tiny", "-o", "tiny"], "is the folder of the model itself"),
        (["tiny", "--sparsity", "0.5"], "sparsity does not go with algorithm 'gptq', only with sparsegpt, wanda"),
        (["tiny", "--smoothquant", "3"], "smoothing_strength is 3.0; it must be from 0 to 1"),
        (["tiny", "--kv-cache-scheme", "fp9"], "unknown kv_cache_scheme 'fp9': did you mean 'fp8'?"),
        (["tiny", "--completion-only"], "words.txt holds plain text, in which nothing is completion"),
        (["tiny", "--streaming"], "'words.txt' is here already; only datasets of the hub can be streamed"),
        (["tiny", "--recipe", "none.yaml"], "--recipe and --group-size are given"),
    ],
)
def test_bad_quantize_input_leaves_nothing_behind(work: Path, arguments: list[str], message: str) -> None:
    before = sorted(p.name for p in work.rglob("*"))
    data = ["--data", "words.txt", "--seq-len", "32", "--device", "cpu"]
    for option, value in (("--samples", "4"), ("--group-size", "32")):
        data += [] if option in arguments else [option, value]
    out, errors = _run("quantize", *arguments, *data, code=2)
    assert message in errors
    assert "Traceback" not in errors
    assert out == ""
    assert sorted(p.name for p in work.rglob("*")) == before


def test_without_a_model_the_shipped_one_is_compared(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODEL_DIR", work / "tiny", raising=False)
    options = ("--group-size", "32", "--data", "words.txt", "--samples", "4", "--seq-len", "32", "--device", "cpu")
    for _ in range(2):  # the second time replaces what the first left
        out, _ = _run("quantize", *options)
        for text in ("original", "round to nearest", "GPTQ", "against original", "KiB"):
            assert text in out
    assert out.splitlines()[-1] == f"The checkpoint is in {work / 'fxcalib-embedded-W4A16'}"
    assert sorted(p.name for p in work.iterdir()) == ["fxcalib-embedded-W4A16", "tiny", "words.txt"]
    out, _ = _run("quantize", *options, "--algorithm", "rtn", "--json", "-o", "own")
    assert json.loads(out)["output"] == str(work / "own")


def test_pace_counts_over_all_passes() -> None:
    pace = Pace()
    pace.plan(subgraphs=2, passes=3, batches=4)
    assert pace.remaining_seconds(0.0) is None
    pace.sweep(0, "calibrate", 4, 100.0)
    for second in (101.0, 102.0, 103.0, 104.0):
        pace.batch(50, second)
    pace.sweep(0, "propagate", 4, 104.0)
    pace.batch(50, 105.0)
    pace.batch(50, 106.0)
    assert (pace.done, pace.total) == (6, 12)
    assert pace.remaining_seconds(106.0) == 6.0
    assert pace.tokens_per_second == 50.0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_where_the_run_is(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    progress = RichProgress(console=console)
    progress.phase("calibrate")
    progress.plan(subgraphs=3, passes=5, batches=2)
    progress.sweep(0, "calibrate", 2)
    progress.batch(64)
    progress.module(ModuleResult("layers.0.up", "int4", 0.0123, "output", 0.1, ("damping [raised]",)))
    if terminal:
        console.print(progress._render())
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "subgraph 1 of 3, calibrate" in shown
    assert "damping [raised]" in shown
    if terminal:
        assert "1.23e-02 of output" in shown
        assert "1/10" in shown


def test_a_log_has_a_line_for_each_subgraph_with_its_worst_module() -> None:
    stream = io.StringIO()
    progress = RichProgress(console=Console(file=stream, force_terminal=False, width=40))
    progress.plan(subgraphs=2, passes=2, batches=1)
    for subgraph in range(2):
        progress.sweep(subgraph, "calibrate", 1)
        progress.batch(64)
        for name, error in (("up", 0.01), ("down", 0.03), ("gate", 0.02)):
            progress.module(ModuleResult(f"layers.{subgraph}.{name}", "int4", error, "output", 0.1))
        progress.subgraph(subgraph, 61.0)
    done = [line for line in stream.getvalue().splitlines() if "done" in line]
    assert [line.rpartition(",")[0] for line in done] == [
        f"subgraph {k + 1} of 2 done in 1 min 01 s, largest error 3.00e-02 of output in layers.{k}.down" for k in (0, 1)
    ]
    assert all(line.endswith(" s left") for line in done)


def test_quiet_progress_is_silent() -> None:
    stream = io.StringIO()
    progress = RichProgress(quiet=True, console=Console(file=stream, force_terminal=True))
    progress.phase("calibrate")
    progress.plan(1, 1, 1)
    progress.sweep(0, "calibrate", 1)
    progress.batch(1)
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.filterwarnings("default")
def test_a_pipeline_that_is_worse_is_warned_of_once_in_one_line(work: Path) -> None:
    stdout, stderr = _run(
        *("quantize", "tiny", "--pipeline", "basic", "--group-size", "32", "--data", "words.txt"),
        *("--samples", "2", "--seq-len", "16", "-o", "out"),
    )
    warned = [line for line in (stdout + stderr).splitlines() if "basic pipeline calibrates every layer" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: the basic pipeline")
    report = json.loads((work / "out" / "fxcalib_report.json").read_text())
    assert [w for w in report["warnings"] if "basic pipeline" in w] == report["warnings"]


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_help_lists_every_pipeline_and_option_of_steps(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stdout, _ = _run(command, "--help")
    for word in ("layer_sequential", "--targets-per-subgraph", "--no-propagate-error", "--suspended"):
        assert word in stdout


def test_a_recipe_by_flags_and_by_file_give_the_same_checkpoint(work: Path) -> None:
    data = ("--data", "words.txt", "--samples", "4", "--seq-len", "32", "--device", "cpu", "--quiet")
    flags = ("--scheme", "W8A8", "--smoothquant", "0.7", "--kv-cache-scheme", "int8")
    _run("quantize", "tiny", *flags, *data, "-o", "first")
    _run("quantize", "tiny", "--recipe", "first/recipe.yaml", *data)
    assert (work / "tiny-recipe" / "recipe.yaml").read_text() == (work / "first" / "recipe.yaml").read_text()
    for file in (work / "first").glob("*.safetensors"):
        assert file.read_bytes() == (work / "tiny-recipe" / file.name).read_bytes()
    report = json.loads((work / "tiny-recipe" / "fxcalib_report.json").read_text())
    assert report["algorithm"] == "SmoothQuantModifier, GPTQModifier"


def test_a_bad_recipe_is_one_message_with_file_line_and_key(work: Path) -> None:
    (work / "bad.yaml").write_text("quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      shceme: W4A16\n")
    for command in ("quantize", "plan"):
        _, errors = _run(command, "tiny", "--recipe", "bad.yaml", code=2)
        message = "error: bad.yaml:4: quant_stage.quant_modifiers.GPTQModifier.shceme: GPTQModifier has no argument"
        assert " ".join(errors.split()).startswith(message), errors
        assert "did you mean 'scheme'" in errors


@pytest.mark.parametrize("algorithm", ["sparsegpt", "wanda", "magnitude"])
def test_pruning(work: Path, algorithm: str) -> None:
    data = ("--data", "words.txt", "--samples", "4", "--seq-len", "32", "--device", "cpu", "--quiet")
    _run("quantize", "tiny", "--algorithm", algorithm, "--mask-structure", "2:4", *data)
    weight = AutoModelForCausalLM.from_pretrained(f"tiny-{algorithm}").model.layers[0].mlp.up_proj.weight
    assert (weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()


def test_batches_from_a_file(work: Path) -> None:
    torch.save([{"input_ids": torch.arange(3, 35).reshape(2, 16)}], "batches.pt")
    given = ("quantize", "tiny", "--group-size", "32", "--device", "cpu")
    out, _ = _run(*given, "--batches", "batches.pt", "--json")
    assert json.loads(out)["tokens"] == 32
    torch.save({"input_ids": torch.arange(3, 35)}, "batch.pt")
    (work / "code.pt").write_bytes(b"cos\nsystem\n(S'touch hit'\ntR.")
    for file, message in (
        ("none.pt", "batches file 'none.pt' cannot be read"),
        ("batch.pt", "batches file 'batch.pt' holds a dict, not a list of batches; save a list of dicts"),
        ("code.pt", "batches file 'code.pt' cannot be read"),
    ):
        _, errors = _run(*given, "--batches", file, "-o", "other", code=2)
        assert message in " ".join(errors.split())
    assert not (work / "hit").exists()
    _, errors = _run(*given, "--batches", "batches.pt", "--data", "words.txt", code=2)
    assert "--data and --batches are given; give one of them" in errors
