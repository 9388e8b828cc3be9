"""The model that the package ships, the text behind it and the script that trained it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from fxcalib.embedded import MODEL_DIR
from fxcalib.embedded.text import documentation, held_out_keys, paragraph_key, paragraphs, training_text
from fxcalib.embedded.train import main, perplexity, token_stream
from fxcalib.errors import DataError

WINDOW = 512


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Every third window of the held-out topics; [tokens]."""
    return torch.cat(token_stream(documentation("heldout"), tokenizer).split(WINDOW)[:-1:3])


def round_to_nearest(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """4-bit symmetric min-max quantization in groups along the input; [out, in]."""
    groups = weight.view(weight.shape[0], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def test_splits_share_no_paragraph() -> None:
    calibration = {paragraph_key(p) for text in documentation("calibration") for p in paragraphs(text)}
    held_out = {paragraph_key(p) for text in documentation("heldout") for p in paragraphs(text)}
    assert not calibration & held_out
    assert len(calibration) > 1000
    assert len(held_out) > 100


def test_splits_are_deterministic_and_big_enough() -> None:
    calibration, held_out = documentation("calibration"), documentation("heldout")
    assert documentation("calibration") == calibration
    assert documentation("heldout") == held_out
    assert sum(map(len, calibration)) > 250_000
    assert 0.04 < sum(map(len, held_out)) / sum(map(len, calibration)) < 0.2
    assert any(text.startswith('The "for" statement') for text in held_out)


def test_paragraphs_keep_indentation_and_compare_without_markup() -> None:
    assert paragraphs("one\n\n   two\n  three\n \n\nfour") == ["one", "   two\n  three", "four"]
    assert paragraph_key('The "for"\n  statement') == paragraph_key("the ``for`` statement.")


def test_training_text_has_no_held_out_and_no_repeated_paragraph(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    held_out = {"for": "A sentence of another version about loops."}
    topics = {**held_out, "in-other-words": "Before.\n\nA sentence of another version\nabout loops.\n\nAfter."}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    (tmp_path / "source.py").write_text('"""A unique docstring."""\n\n\n# a sentence of another version about loops\n')
    found = [p for text in training_text([tmp_path]) for p in paragraphs(text)]
    keys = [paragraph_key(p) for p in found]
    assert {"Before.", "After.", '"""A unique docstring."""'} <= set(found)
    assert len(keys) == len(set(keys))
    assert not held_out_keys(topics) & set(keys)


def test_training_text_refuses_a_folder_without_topics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no standard library: it has no pydoc_data/topics\.py; pass a folder"):
        training_text([tmp_path])


def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in [*documentation("heldout")[:3], "  two spaces\n\ttab, ünïcode 漢字 🙂 don 't \n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id


def test_every_usual_group_size_divides_the_model(model: LlamaForCausalLM) -> None:
    widths = {module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert all(width % 128 == 0 for width in widths)
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 6.5e6


def test_model_generates(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer('The "while" statement is used for', return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 8


def test_four_bits_visibly_hurt_the_held_out_perplexity(model: LlamaForCausalLM, held_out: torch.Tensor) -> None:
    before = perplexity(model, held_out, WINDOW)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(round_to_nearest(module.weight, 128))
    after = perplexity(model, held_out, WINDOW)
    assert before < 18
    assert after > 1.03 * before


def test_train_writes_a_checkpoint_that_loads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "model"
    sizes = "--vocab 300 --hidden 32 --intermediate 32 --layers 1 --heads 2 --kv-heads 1 --context 128"
    schedule = "--topics-only --device cpu --steps 2 --batch 2 --window 64"
    assert main([f"--output={output}", *sizes.split(), *schedule.split()]) == 0
    assert "held-out perplexity" in capfd.readouterr().out
    assert os.listdir(output.parent) == ["model"]
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == 300
    logits = model(**tokenizer("import this", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_train_refuses_what_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--output={tmp_path}"]) == 2
    assert "exists; choose a new folder" in " ".join(capsys.readouterr().err.split())
    assert main([f"--output={tmp_path / 'new'}", "--heads=3"]) == 2
    assert "heads must divide hidden" in " ".join(capsys.readouterr().err.split())
    assert main([f"--output={tmp_path / 'new'}", "--window=4096"]) == 2
    assert "is over the model's context" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
