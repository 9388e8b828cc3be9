"""What can be loaded is loaded; for the rest, the text of each error names the culprit and the next step."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import round_to_nearest, save_tiny_llama, tiny_llama, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, LlamaModel

from fxcalib import checkpoint
from fxcalib.errors import AlreadyQuantizedError, ModelError, NonFiniteWeightError, OptionError
from fxcalib.loading import load, refuse_non_finite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, drop: str = "", poison: str = "") -> None:
    weights = load_file(folder / "model.safetensors")
    if drop:
        del weights[drop]
    if poison:
        weights[poison].view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_local_folder(folder: Path) -> None:
    loaded = load(folder)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert loaded.name == "tiny-llama"
    assert loaded.source == folder
    assert loaded.processor("w5 w6")["input_ids"] == [5, 6]
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert next(load(str(folder), dtype="bf16").model.parameters()).dtype == torch.bfloat16


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load(folder).processor is None


def test_a_damaged_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of model"):
        load(folder)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(lambda: BertForMaskedLM(_bert()), "BertForMaskedLM"), (lambda: LlamaModel(tiny_llama().config), "LlamaModel")],
)
def test_the_architecture_chooses_the_class(tmp_path: Path, make: object, expected: str) -> None:
    make().save_pretrained(tmp_path / "model")
    assert type(load(tmp_path / "model").model).__name__ == expected


def _bert() -> BertConfig:
    return BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def test_a_mistyped_path_offers_its_siblings(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny-lama' does not exist; did you mean 'tiny-llama'\?"):
        load(folder.parent / "tiny-lama")
    with pytest.raises(ModelError, match="the nearest folder that does is"):
        load(folder.parent / "missing" / "tiny-llama")


def test_what_is_no_model_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json; did you mean '.*tiny-llama'\?"):
        load(folder.parent)
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        load(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_hub_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"'no-such-org/no-such-model' is no local folder and could not be had .*network"
    ):
        load("no-such-org/no-such-model")


def test_unknown_architecture(folder: Path) -> None:
    _edit_config(folder, model_type="llamma")
    with pytest.raises(ModelError, match="llamma"):
        load(folder)


def test_already_quantized(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    with pytest.raises(
        AlreadyQuantizedError, match=r"'tiny-llama' is already quantized \(quant_method 'compressed-ten"
    ):
        load(folder)


@pytest.mark.parametrize("preset", ["W4A16", "FP8_DYNAMIC"])
def test_a_quantized_checkpoint_can_be_loaded_to_look_at(
    tmp_path: Path, preset: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    round_to_nearest(model, preset, group_size=32 if preset == "W4A16" else None)
    saved = checkpoint.save(model, tmp_path / "out", processor=tiny_tokenizer())
    ids = torch.arange(3, 13)[None]
    with pytest.raises(AlreadyQuantizedError):
        load(saved.path)
    logits = load(saved.path, allow_quantized=True).model(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert capfd.readouterr().err == ""  # no progress bars of others


def test_non_finite_weights(folder: Path) -> None:
    _edit_weights(folder, poison="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        NonFiniteWeightError, match=r"'model.layers.1.mlp.up_proj.weight' holds 1 NaN .* of 8192 values"
    ):
        load(folder)
    model = tiny_llama()
    refuse_non_finite(model)
    model.model.norm.weight[0] = float("inf")
    with pytest.raises(NonFiniteWeightError, match=r"model.norm.weight"):
        refuse_non_finite(model)


def test_missing_weights(folder: Path) -> None:
    _edit_weights(folder, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForCausalLM, such as 'model.layers.1.mlp.up_proj"):
        load(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="convert them to safetensors first"):
        load(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="a weight file of model 'tiny-llama' is damaged"):
        load(folder)


def test_remote_code_needs_a_flag(folder: Path) -> None:
    _edit_config(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match="brings its own code; read it, then pass --trust-remote-code"):
        load(folder)


def test_options(folder: Path) -> None:
    with pytest.raises(OptionError, match="unknown dtype 'bfloat': did you mean 'bfloat16'"):
        load(folder, dtype="bfloat")
    with pytest.raises(OptionError, match="device 'cupu' cannot be used"):
        load(folder, device="cupu")
