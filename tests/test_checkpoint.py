"""A saved checkpoint is the in-memory model, compressed; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus, preset_name_to_scheme
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, round_module, round_to_nearest, save_tiny_llama, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fxcalib import checkpoint
from fxcalib.errors import OutputError
from fxcalib.report import Report

SCHEMES = [
    ("W4A16", 32),
    ("W4A16_ASYM", 32),
    ("W3A16", 64),
    ("W8A16", 32),
    ("W8A8", None),
    ("FP8", None),
    ("FP8_DYNAMIC", None),
]


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def _report() -> Report:
    return Report(
        model="tiny", pipeline="sequential", algorithm="rtn", scheme="W4A16", subgraphs=(), modules=(), seconds=1.0,
        timings={}, tokens=24, samples=2, batches=1, passes=1, retraces=0, peak_host_bytes=1, peak_device_bytes=0,
        seed=0, data={}, versions={},
    )  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(("preset", "group_size"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_logits_are_those_of_the_model(
    tmp_path: Path, preset: str, group_size: int | None, dtype: torch.dtype
) -> None:
    model = tiny_llama(dtype=dtype, attention_bias=True)
    original = model(_ids()).logits
    round_to_nearest(model, preset, group_size=group_size)
    before = model(_ids()).logits
    assert not torch.equal(original, before)

    saved = checkpoint.save(model, tmp_path / "out")

    assert torch.equal(model(_ids()).logits, before)
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    assert loaded.dtype == dtype
    after = loaded(_ids()).logits
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert torch.equal(loaded.get_submodule(name).weight, module.weight), name
    # bfloat16 keeps 8 bits, and an activation that lands beside a rounding step of its own adds one such step
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * before.abs().max().item())
    generated = loaded.generate(_ids(), max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 16)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_only_packed_weights_are_stored(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    round_to_nearest(model, "W4A16", group_size=32)
    saved = checkpoint.save(model, tmp_path / "out")
    stored = load_file(saved.path / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj"
    assert {k for k in stored if k.startswith(prefix)} == {
        f"{prefix}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape", "bias")
    }
    assert stored[f"{prefix}.weight_packed"].shape == (64, 8)
    assert torch.equal(stored[f"{prefix}.bias"], bias)
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    assert saved.bytes == sum(len(content) for content in _files(saved.path).values())
    config = json.loads((saved.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert len({file.stat().st_mode for file in saved.path.iterdir()}) == 1


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama()
    round_to_nearest(model, "W8A8")
    names = list(model.state_dict())
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    hooks = len(model._forward_pre_hooks)
    checkpoint.save(model, tmp_path / "out")
    assert list(model.state_dict()) == names
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    assert len(model._forward_pre_hooks) == hooks
    statuses = {m.quantization_status for m in model.modules() if hasattr(m, "quantization_status")}
    assert statuses == {QuantizationStatus.DECOMPRESSED}


def test_mixed_schemes_come_back_on_their_modules(tmp_path: Path) -> None:
    """Both schemes say `Linear`: the saved config must tell the modules apart all the same."""
    model = tiny_llama()
    round_to_nearest(model, "W4A16", group_size=32, ignore=("lm_head", "model.layers.1.mlp.down_proj"))
    round_module(model.model.layers[1].mlp.down_proj, preset_name_to_scheme("W8A8", ["Linear"]))
    before = model(_ids()).logits
    saved = checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    assert loaded.model.layers[1].mlp.down_proj.quantization_scheme.weights.num_bits == 8
    assert loaded.model.layers[0].mlp.down_proj.quantization_scheme.weights.num_bits == 4
    torch.testing.assert_close(loaded(_ids()).logits, before, rtol=1e-5, atol=1e-5)
    config = json.loads((saved.path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"


@pytest.mark.parametrize("preset", ["W4A16", "W8A8"])
def test_a_quantized_head_is_no_longer_tied(tmp_path: Path, preset: str) -> None:
    model = tiny_llama()
    round_to_nearest(model, preset, group_size=32 if preset == "W4A16" else None, ignore=())
    before = model(_ids()).logits
    saved = checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    torch.testing.assert_close(loaded(_ids()).logits, before, rtol=1e-5, atol=1e-5)
    assert loaded.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "20KB")
    model = tiny_llama()
    round_to_nearest(model, "W4A16", group_size=32)
    before = model(_ids()).logits
    saved = checkpoint.save(model, tmp_path / "out")
    assert len(list(saved.path.glob("model-*.safetensors"))) > 2
    assert (saved.path / "model.safetensors.index.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    torch.testing.assert_close(loaded(_ids()).logits, before, rtol=1e-5, atol=1e-5)


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        model = tiny_llama()
        round_to_nearest(model, "W4A16", group_size=32)
        contents.append(_files(checkpoint.save(model, tmp_path / name, processor=tiny_tokenizer()).path))
    assert contents[0] == contents[1]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_llama()
    round_to_nearest(model, "W4A16", group_size=32)
    first = _files(checkpoint.save(model, tmp_path / "a").path)
    assert _files(checkpoint.save(model, tmp_path / "b").path) == first


def test_tokenizer_generation_config_and_report_come_along(tmp_path: Path) -> None:
    model = tiny_llama()
    # do_sample is off, so transformers calls this config invalid and would refuse to save it
    model.generation_config.temperature = 0.3
    round_to_nearest(model, "W4A16", group_size=32)
    saved = checkpoint.save(model, tmp_path / "out", processor=tiny_tokenizer(), report=_report())
    assert AutoTokenizer.from_pretrained(saved.path)("w5 w6")["input_ids"] == [5, 6]
    assert json.loads((saved.path / "generation_config.json").read_text())["temperature"] == 0.3
    assert model.generation_config.temperature == 0.3
    assert Report.from_dict(json.loads((saved.path / checkpoint.REPORT_NAME).read_text())) == _report()


def test_files_of_the_source_are_copied_unchanged(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = save_tiny_llama(source)
    (source / "LICENSE").write_text("do as you like")
    (source / "notes.txt").write_text("not part of a model")
    (source / "module.py").write_text("no code of the model: there is no auto_map")
    round_to_nearest(model, "W4A16", group_size=32)
    saved = checkpoint.save(model, tmp_path / "out", processor=tiny_tokenizer(), source=source)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (saved.path / name).read_bytes() == (source / name).read_bytes(), name
    assert not (saved.path / "notes.txt").exists()
    assert not (saved.path / "module.py").exists()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.last = nn.Linear(64, 8)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.first(x_BD)))


def test_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain()
    round_to_nearest(model, "W4A16", group_size=32, ignore=("last",))
    saved = checkpoint.save(model, tmp_path / "out")
    stored = load_file(saved.path / "model.safetensors")
    assert torch.equal(stored["last.weight"], model.last.weight)
    assert sum(name.endswith("weight_packed") for name in stored) == 1
    config = json.loads((saved.path / "config.json").read_text())
    assert config["architectures"] == ["Plain"]
    assert config["quantization_config"]["ignore"] == ["last"]


def test_an_unquantized_model(tmp_path: Path) -> None:
    model = tiny_llama()
    saved = checkpoint.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((saved.path / "config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(saved.path)(_ids()).logits, model(_ids()).logits)


class BrokenProcessor:
    """Fails as a full disk does, after the weights were written."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["out", "new/parents/out"])
def test_nothing_is_left_behind_on_failure(tmp_path: Path, name: str) -> None:
    model = tiny_llama()
    with pytest.raises(
        OutputError, match=r"out' could not be written: No space left on device; nothing was left behind"
    ):
        checkpoint.save(model, tmp_path / name, processor=BrokenProcessor())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out"
    checkpoint.save(tiny_llama(), output, report=_report())
    old = _files(output)
    with pytest.raises(OutputError):
        checkpoint.save(tiny_llama(seed=1), output, processor=BrokenProcessor(), overwrite=True)
    assert _files(output) == old
    assert list(tmp_path.iterdir()) == [output]


def test_overwrite(tmp_path: Path) -> None:
    output = tmp_path / "out"
    checkpoint.save(tiny_llama(), output, report=_report())
    (output / "stale.txt").write_text("from before")
    with pytest.raises(OutputError, match="is not empty; give a new one or pass --overwrite"):
        checkpoint.prepare_output(output)
    checkpoint.save(tiny_llama(seed=1), output, report=_report(), overwrite=True)
    assert not (output / "stale.txt").exists()
    assert list(tmp_path.iterdir()) == [output]
    embedding = load_file(output / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, tiny_llama(seed=1).model.embed_tokens.weight)


def test_prepare_output_creates_nothing(tmp_path: Path) -> None:
    assert checkpoint.prepare_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert checkpoint.prepare_output(tmp_path / "empty") == tmp_path / "empty"
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_prepare_output_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(OutputError, match="file' is a file"):
        checkpoint.prepare_output(tmp_path / "file")
    with pytest.raises(OutputError, match=r"out' cannot be created: '.*file' is a file"):
        checkpoint.prepare_output(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="holds files that fxcalib did not write"):
        checkpoint.prepare_output(tmp_path / "photos", overwrite=True)
    with pytest.raises(OutputError, match="is the folder of the model itself"):
        checkpoint.prepare_output(tmp_path / "photos", overwrite=True, source=tmp_path / "photos")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_prepare_output_refuses_an_unwritable_folder() -> None:
    with pytest.raises(OutputError, match=r"out' cannot be written: '/proc'"):
        checkpoint.prepare_output("/proc/out")


def test_custom_code_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny_llama(source)
    (source / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    round_to_nearest(model, "W4A16", group_size=32)
    before = model(_ids()).logits
    saved = checkpoint.save(model, tmp_path / "out", source=source)
    shutil.rmtree(source)
    assert (saved.path / "modeling_own.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(saved.path, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(loaded(_ids()).logits, before, rtol=1e-5, atol=1e-5)
