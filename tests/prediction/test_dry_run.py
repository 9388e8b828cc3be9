"""`fxcalib plan`: what it prints, what it refuses, and that it plans what runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import state_of, token_batch
from compressed_tensors.quantization.utils.helpers import _calculate_range
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fxcalib import cli
from fxcalib.api import plan, quantize
from fxcalib.checkpoint import compressed_state
from fxcalib.errors import AlreadyQuantizedError, FxcalibError, ModelError, OptionError, OutputError, TargetError
from fxcalib.modifiers import GPTQModifier, QuantizationModifier
from fxcalib.prediction import DryRun, machine

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS: dict[str, Any] = {"group_size": 32, "samples": 10, "seq_len": 16, "batch_size": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "tiny", num_hidden_layers=4)
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", ["packed", "padded", "weight_only"])
def test_golden(name: str, tiny: Path) -> None:
    options = {**OPTIONS, "pack": name != "padded"} | ({"algorithm": "rtn"} if name == "weight_only" else {})
    path = GOLDEN / f"dry_run_{name}.txt"
    text = f"{plan(tiny, **options)}\n"
    if "FXCALIB_UPDATE_GOLDEN" in os.environ:
        path.write_text(text)
    assert text == path.read_text()


def test_no_weight_file_is_read(tiny: Path) -> None:
    with_weights = plan(tiny, **OPTIONS)
    for file in tiny.glob("*.safetensors"):
        file.unlink()
    assert plan(tiny, **OPTIONS).to_dict() == with_weights.to_dict()


def test_the_plan_is_the_one_that_runs(tiny: Path) -> None:
    batches = [token_batch(rows, 16, seed=i) for i, rows in enumerate((4, 4, 2))]
    report = quantize(tiny, group_size=32, data=batches, device="cpu")
    dry = plan(tiny, **OPTIONS)
    assert dry.plan.passes == report.passes
    assert [s.index for s in dry.subgraphs] == [s.index for s in report.subgraphs]
    assert sum(s.compressed for s in dry.subgraphs) == len(report.modules)
    assert dry.batches == report.batches


def test_stored_values_are_counted_over_all_batches(tiny: Path) -> None:
    carried = {value.name: value for value in plan(tiny, **OPTIONS).subgraphs[1].carries}
    hidden = carried["model_layers_1"]
    assert (hidden.shape, hidden.dtype, hidden.stored) == (("batch", "sequence", "64"), "float32", True)
    assert hidden.batch_bytes == 4 * 16 * 64 * 4
    assert hidden.total_bytes == 10 * 16 * 64 * 4  # the last batch holds 2 samples
    assert hidden.freed_after == 2


def test_a_padded_batch_stores_no_mask_of_queries_and_keys(tiny: Path) -> None:
    run = plan(tiny, **{**OPTIONS, "seq_len": 32}, pack=False)
    masks = [v for v in run.subgraphs[0].carries if v.dtype == "bool"]
    assert [m.total_bytes for m in masks] == [10 * 32]
    again = [v for v in run.subgraphs[1].recomputes if v.dtype == "bool"]
    assert [v.total_bytes for v in again] == [10 * 32 * 32]
    assert run.saved_by_recomputing >= 10 * 32 * 32
    assert not [v for v in plan(tiny, **OPTIONS).subgraphs[1].recomputes if v.dtype == "bool"]


def test_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    for scheme in ("W8A8", "W4A16"):
        size = 32 if scheme == "W4A16" else None
        report = quantize(tmp_path / "bf16", scheme=scheme, group_size=size, algorithm="rtn", data=None, output=None)
        assert report.modules
        model = tiny_llama(dtype=torch.bfloat16)
        QuantizationModifier(scheme=scheme, group_size=size).attach(model)
        # tied embeddings are one tensor
        unique = {(t.data_ptr(), t.shape): t.nbytes for t in compressed_state(model).values()}
        dry = plan(tmp_path / "bf16", scheme=scheme, group_size=size, algorithm="rtn")
        extra = 8 * 2 * 7 * (scheme == "W4A16") + 64  # shapes of packed weights; buffers that are not saved
        assert dry.disk_bytes == pytest.approx(sum(unique.values()), abs=2 * extra)


def test_flops_are_those_of_the_matrix_products() -> None:
    model = tiny_llama(num_hidden_layers=1)
    run = plan(model, modifiers=QuantizationModifier(scheme=_static(), ignore=["lm_head"]), **_sizes(4, 4, 16))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    tokens = 4 * 16
    attention = 2 * 4 * 4 * 16 * 16 * (16 + 16)
    assert run.plan.passes == 1
    with FlopCounterMode(display=False) as counter:  # frequencies times positions: a product in some versions only
        model.model.rotary_emb(torch.empty(1, 16, 64), torch.arange(16)[None])
    rotary = counter.get_total_flops()
    assert run.flops == 2 * layer * tokens + attention + rotary


def _static() -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    return {"weights": {**args, "strategy": "channel"}, "input_activations": {**args, "strategy": "tensor"}}


def _sizes(samples: int, batch_size: int, seq_len: int) -> dict[str, Any]:
    return {"samples": samples, "batch_size": batch_size, "seq_len": seq_len, "device": "cpu"}


def test_statistics_are_one_hessian_for_each_distinct_input() -> None:
    run = plan(tiny_llama(), modifiers=GPTQModifier(scheme="W4A16", group_size=32), **_sizes(4, 4, 16))
    hessians = 4 * (64 * 64 * 3 + 128 * 128)  # q k v; o; gate up; down
    assert hessians <= run.subgraphs[0].statistics_bytes <= hessians + 1024


def test_planning_leaves_nothing_behind_that_saving_would_use(tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "data": [token_batch(4, 16)], "device": "cpu"}
    quantize(tiny, **options, output=tmp_path / "alone")
    _calculate_range.cache_clear()  # as in a new process: what compressed-tensors memoizes is made by the plan
    plan(tiny, **OPTIONS)
    quantize(tiny, **options, output=tmp_path / "after")
    alone, after = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "after"))
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[name], after[name]) for name in alone)


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = tiny_llama()
    before, training = state_of(model), model.training
    plan(model, **OPTIONS)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training == training
    assert not any(hasattr(m, "quantization_scheme") or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("pipeline", "passes"), [("basic", 1), ("independent", 7), ("datafree", 0)])
@pytest.mark.filterwarnings("ignore:the basic pipeline")
def test_other_pipelines(pipeline: str, passes: int, tiny: Path) -> None:
    algorithm = "rtn" if pipeline == "datafree" else "gptq"
    run = plan(tiny, **OPTIONS, pipeline=pipeline, algorithm=algorithm)
    assert run.plan.passes == passes
    assert run.peak("host").host_bytes > run.weight_bytes
    assert str(run)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"algorithm": "gtpq"}, OptionError, "did you mean 'gptq'"),
        ({"scheme": "W4A61"}, OptionError, "unknown scheme"),
        ({"group_size": 48}, OptionError, "does not divide"),
        ({"ignore": ["lm_haed"]}, TargetError, "lm_haed"),
        ({"targets": "LlamaLayer"}, TargetError, "LlamaDecoderLayer"),
        ({"pipeline": "datafree"}, OptionError, "needs it"),
        ({"dtype": "bfloat61"}, OptionError, "bfloat16"),
        ({"samples": 0}, OptionError, "samples is 0"),
        ({"batch_size": 0}, OptionError, "batch_size is 0"),
        ({"offload": "nowhere"}, OptionError, "nowhere"),
        ({"device": "cuda:99"}, OptionError, "cuda:99"),
        ({"targets_per_subgraph": 0}, OptionError, "targets_per_subgraph"),
    ],
)
def test_bad_options_are_refused_as_quantize_refuses_them(
    options: dict[str, Any], error: type[FxcalibError], says: str, tiny: Path
) -> None:
    with pytest.raises(error, match=says):
        plan(tiny, **{**OPTIONS, **options})


def test_bad_models_and_outputs(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        plan(tmp_path / "tyni")
    with pytest.raises(OutputError, match="folder of the model itself"):
        plan(tiny, **OPTIONS, output=tiny)
    quantize(tiny, group_size=32, algorithm="rtn", output=tmp_path / "done")
    with pytest.raises(AlreadyQuantizedError):
        plan(tmp_path / "done")
    modifiers = [GPTQModifier(scheme="W4A16", group_size=32, targets=[t]) for t in ("re:.*mlp.*", "re:.*attn.*_proj")]
    with pytest.raises(OptionError, match="each of them by itself"):
        plan(tiny, modifiers=modifiers, pipeline="independent")


def test_layer_sequential_is_planned_as_sequential_and_says_so(tiny: Path) -> None:
    chained, traced = plan(tiny, **OPTIONS, pipeline="layer_sequential"), plan(tiny, **OPTIONS)
    assert chained.plan == traced.plan
    assert (chained.pipeline, traced.note) == ("sequential", "")
    assert "layer_sequential traces nothing and needs weights: this is the plan of sequential" in str(chained)


def test_the_command_takes_what_quantize_takes_of_steps(tiny: Path) -> None:
    arguments = ["plan", str(tiny), "--group-size", "32", "--samples", "4", "--seq-len", "16", "--json"]
    more = ["--targets-per-subgraph", "2", "--no-propagate-error"]
    both = [json.loads(CliRunner().invoke(cli.app, [*arguments, *given]).stdout) for given in ([], more)]
    assert [len(data["subgraphs"]) for data in both] == [5, 3]
    assert [data["passes"] for data in both] == [7, 2]


KEYS = {
    *("model", "pipeline", "algorithm", "device", "dtype", "parameters", "weight_bytes", "samples", "batch_size"),
    *("batches", "seq_len", "padded", "inputs", "subgraphs", "moments", "moved", "disk_bytes", "saved_by_recomputing"),
    *("flops", "seconds", "steps", "passes", "peaks", "note"),
}


def test_json_is_one_document_with_known_keys(tiny: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["plan", str(tiny), "--group-size", "32", "--samples", "10", "--seq-len", "16", "--json"]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data.keys() == KEYS
    assert data["peaks"].keys() == {"device", "host", "disk"}
    assert data["peaks"]["host"].keys() == {"bytes", "step", "name", "parts"}
    assert data["subgraphs"][0].keys() == {
        *("index", "like", "modules", "observed", "compressed", "weight_bytes", "reads", "carries", "recomputes"),
        *("frees", "working_bytes", "statistics_bytes", "commit_bytes", "flops"),
    }
    assert data["subgraphs"][0]["carries"][0].keys() == {
        *("name", "shape", "dtype", "batch_bytes", "total_bytes", "stored", "freed_after")
    }
    assert len(data["steps"]) == len([m for m in data["moments"] if m["step"] is not None])
    assert data["seconds"] is None


def test_the_command_reports_errors_like_the_others(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "none")])
    assert result.exit_code == cli.BAD_INPUT
    assert "does not exist" in result.stderr
    assert result.stdout == ""


def test_times_are_estimated_from_measured_rates(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    monkeypatch.setitem(machine._SIZE, "cpu", 64)
    assert plan(tiny, **OPTIONS).seconds is None
    first = plan(tiny, **OPTIONS, calibrate_machine=True)
    assert [f.name for f in (cache / "fxcalib").iterdir()] == ["machine.json"]
    assert first.seconds is not None and first.seconds > 0
    assert plan(tiny, **OPTIONS).seconds == first.seconds
    more = plan(tiny, **{**OPTIONS, "samples": 20}).seconds
    assert more is not None and first.seconds < more < 2.5 * first.seconds
    machine.path().write_text("{damaged")
    assert plan(tiny, **OPTIONS).seconds is None


def _peak(run: DryRun) -> int:
    return run.peak("host").host_bytes


def test_more_data_takes_more_memory_and_more_tokens_a_batch_do_too() -> None:
    model = tiny_llama()
    small = plan(model, **OPTIONS)
    assert _peak(plan(model, **{**OPTIONS, "samples": 1000})) > _peak(small)
    longer = plan(model, **{**OPTIONS, "seq_len": 32})
    assert longer.subgraphs[0].working_bytes > small.subgraphs[0].working_bytes
