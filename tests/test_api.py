from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import token_batch
from tiny_llama import save_tiny_llama, tiny_llama, tiny_mixture, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fxcalib import GPTQModifier, Report, calibrate, quantize
from fxcalib.errors import (
    AlreadyQuantizedError,
    BatchError,
    DataError,
    FxcalibError,
    ModelError,
    NonFiniteWeightError,
    OptionError,
    OutputError,
    TargetError,
)

BATCHES = [token_batch(2, 16, seed=i, left=i % 3) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(path, dtype=torch.bfloat16)
    (path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": " ".join(f"w{(i * j) % 120 + 3}" for j in range(60))}) for i in range(40))
    )
    return path


def small(folder: Path, **options: Any) -> dict[str, Any]:
    return {"model": folder, "data": folder / "text.jsonl", "samples": 6, "seq_len": 32, "group_size": 32, **options}


def weights_of(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("algorithm", "scheme", "group_size"),
    [("gptq", "W4A16", 32), ("gptq", "W4A16_ASYM", 32), ("rtn", "W8A8", None), ("rtn", "FP8", None)],
)
def test_from_checkpoint_to_checkpoint(
    folder: Path, tmp_path: Path, algorithm: str, scheme: str, group_size: int | None
) -> None:
    output = tmp_path / "out"
    report = quantize(
        **small(folder, algorithm=algorithm, scheme=scheme, group_size=group_size), evaluate=False, output=output
    )
    saved = json.loads((output / "fxcalib_report.json").read_text())
    assert Report.from_dict(saved).modules == report.modules
    assert saved["algorithm"] == algorithm
    assert saved["output"] == str(output)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    if algorithm == "gptq":
        assert saved["data"]["source"] == "text.jsonl"
        assert report.tokens == 6 * 32
        assert report.passes == 3


def test_the_checkpoint_computes_what_the_model_in_memory_does(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    quantize(model, data=BATCHES, processor=tiny_tokenizer(), group_size=32, output=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected, actual = model(**BATCHES[1]).logits, loaded(**BATCHES[1]).logits
    real = BATCHES[1]["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"])
def test_weights_in_bfloat16_survive_packing_to_the_bit(folder: Path, tmp_path: Path, scheme: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = 32 if scheme in ("W4A16", "W8A16") else None
    quantize(model, scheme=scheme, group_size=size, data=BATCHES, output=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        loaded(**BATCHES[0])  # the first forward unpacks
        assert torch.equal(loaded(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    weights = {n: m.weight for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(torch.equal(weights[n], m.weight) for n, m in model.named_modules() if n in weights)


def test_the_same_seed_and_data_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        quantize(**small(folder), output=tmp_path / name)
    quantize(**small(folder, seed=1), output=tmp_path / "other")
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")
    assert weights_of(tmp_path / "first") != weights_of(tmp_path / "other")


def test_a_model_without_a_name_and_without_saving() -> None:
    report = quantize(tiny_llama(), data=BATCHES, group_size=32)
    assert report.model == "LlamaForCausalLM"
    assert report.output is None
    assert report.data["source"] == "given batches"
    assert report.scheme == "W4A16 group 32"


def test_evaluation_before_and_after(folder: Path) -> None:
    report = quantize(**small(folder, algorithm="rtn"), evaluate=True)
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert {"evaluate before", "evaluate after", "calibrate", "load"} <= report.timings.keys()


def spoiled(folder: Path, tmp_path: Path) -> Path:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "spoiled")
    tiny_tokenizer().save_pretrained(tmp_path / "spoiled")
    return tmp_path / "spoiled"


BAD: list[tuple[dict[str, Any], type[FxcalibError], str]] = [
    ({"model": "no/such-model"}, ModelError, "no/such-model"),
    ({"scheme": "W4A61"}, OptionError, "did you mean 'W4A16'"),
    ({"algorithm": "gtpq"}, OptionError, "did you mean 'gptq'"),
    ({"pipeline": "sequental"}, OptionError, "did you mean 'sequential'"),
    ({"pipeline": "datafree"}, OptionError, "GPTQModifier needs it"),
    ({"group_size": 48}, OptionError, "48"),
    ({"samples": 100_000}, DataError, "100000|100,000"),
    ({"data": "missing.jsonl"}, DataError, "missing.jsonl"),
    ({"text_column": "txet"}, DataError, "text"),
    ({"targets": ["LlamaDecoderLayr"]}, TargetError, "did you mean 'LlamaDecoderLayer'"),
    ({"ignore": ["lm_haed"]}, TargetError, "did you mean 'lm_head'"),
    ({"offload": "gpu"}, OptionError, "neither 'auto', 'cpu', 'none' nor a device"),
    ({"device": "cuda:77"}, OptionError, "cannot be used here"),
    ({"dtype": "bfloat61"}, OptionError, "did you mean 'bfloat16'"),
    ({"batch_size": 0}, OptionError, "batch_size"),
    ({"data": [{"labels": torch.ones(1, 4, dtype=torch.int64)}]}, BatchError, "input_ids"),
    ({"data": [{"input_ids": torch.full((1, 4), 4096)}]}, BatchError, "4096"),
    ({"data": []}, DataError, "no batch"),
    ({"data": Path("zzz")}, DataError, "data file 'zzz' does not exist"),
    ({"data": 5}, DataError, "data is 5, a int; give a file"),
    ({"model": 3}, ModelError, "model is 3, a int; give a folder, a hub id or an nn.Module"),
    ({"model": tiny_llama().to("meta"), "data": BATCHES}, ModelError, "lies on the meta device and has no values"),
    ({"algorithm": None}, OptionError, "algorithm is None; give one of gptq, rtn"),
    ({"modifiers": "gptq"}, OptionError, r"modifiers holds 'gptq', a str; give modifiers, such as GPTQModifier"),
    ({"scheme": 4}, OptionError, "scheme is 4; give a preset's name"),
    ({"seed": "a"}, OptionError, "seed is 'a', a str; it must be a whole number"),
    ({"samples": 6.5}, OptionError, "samples is 6.5, a float; it must be a whole number"),
    ({"pipeline": 3}, OptionError, "pipeline is 3"),
    ({"offload": "cuda:77"}, OptionError, "offload 'cuda:77' cannot be used here: .*; use 'cpu' or 'none'"),
    ({"offload": "meta"}, OptionError, "offload 'meta' keeps no values"),
    ({"device": "meta"}, OptionError, "device 'meta' computes no values"),
    ({"dtype": torch.bfloat16}, OptionError, "unknown dtype torch.bfloat16: did you mean 'bfloat16'"),
    ({"ignore": ["re:["]}, TargetError, r"ignore pattern 're:\[' is no regular expression"),
    ({"targets": ["re:("]}, TargetError, r"sequential target 're:\(' is no regular expression"),
    ({"targets": []}, TargetError, "the list is empty; leave it out for the layers"),
    (
        {"targets": ["LlamaForCausalLM"]},
        TargetError,
        "matches only the whole model, .* such as LlamaDecoderLayer, or use pipeline='basic'",
    ),
    ({"data": [{"x": torch.ones(1, 4)}]}, BatchError, "its keys are 'x': rename or add one"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_input_names_the_culprit_and_leaves_nothing_behind(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: type[FxcalibError], text: str
) -> None:
    with pytest.raises(error, match=text):
        quantize(**{**small(folder), **options}, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_calibrate_refuses_what_quantize_refuses_of_a_model() -> None:
    modifier = GPTQModifier(scheme="W4A16", group_size=32)
    model = tiny_llama()
    model.model.norm.weight[3] = torch.inf
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'model.norm.weight' holds 1 NaN or infinite of 64"):
        calibrate(model, BATCHES, modifier)
    with pytest.raises(ModelError, match="lies on the meta device"):
        calibrate(tiny_llama().to("meta"), BATCHES, modifier)
    with pytest.raises(OptionError, match="modifiers holds 'gptq'"):
        calibrate(tiny_llama(), BATCHES, "gptq")  # type: ignore[arg-type]


def test_a_scheme_as_a_dict_is_described_in_the_report() -> None:
    report = quantize(tiny_llama(), scheme={"W8A16": ["Linear"]}, group_size=32, algorithm="rtn")  # type: ignore[arg-type]
    assert report.scheme == "int8 group 32 symmetric"


def test_models_in_float64_are_quantized(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    quantize(model, data=BATCHES, group_size=32, output=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(loaded(**BATCHES[0]).logits, model(**BATCHES[0]).logits, rtol=0, atol=1e-5)


def test_what_cannot_be_quantized_is_noted() -> None:
    assert not quantize(tiny_llama(), algorithm="rtn", group_size=32).notes
    report = quantize(tiny_mixture("Mixtral"), algorithm="rtn", group_size=32)
    (note,) = report.notes
    assert re.fullmatch(
        r"[\d,]+ of [\d,]+ parameters \(\d\d%\) stay as they are: they are in MixtralExperts, .*, "
        "and only Linear and Embedding modules can be quantized",
        note,
    )
    assert f"  note: {note}" in str(report)
    assert Report.from_dict(report.to_dict()).notes == report.notes


def test_a_spoiled_weight_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(**small(spoiled(folder, tmp_path), data=BATCHES), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    quantize(**small(folder, algorithm="rtn"), output=tmp_path / "once")
    with pytest.raises(AlreadyQuantizedError, match="once"):
        quantize(**small(tmp_path / "once", data=BATCHES), output=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_folder_in_use_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="is not empty"):
        quantize("no/such-model", output=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
