"""Perplexity and KL divergence against float64 references, on checkpoints and model objects."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import round_to_nearest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fxcalib.evaluation
from fxcalib import checkpoint
from fxcalib.errors import BatchError, DataError, ModelError, OptionError
from fxcalib.evaluation import Evaluation, evaluate, kl_divergence, perplexity
from fxcalib.progress import Progress

VOCABULARY = 40


def make_model(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    tokens = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<eos>")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """(window, sequence, vocabulary) float64, by definition: exponentials over their sum."""
    with torch.no_grad():
        exponentials = model(input_ids=windows).logits.double().exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)).log()


def reference_perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    log_p = log_probabilities(model, windows)
    losses = [-log_p[w, t, windows[w, t + 1]].item() for w in range(len(windows)) for t in range(windows.shape[1] - 1)]
    return math.exp(sum(losses) / len(losses))


def reference_kl(model: LlamaForCausalLM, reference: LlamaForCausalLM, windows: torch.Tensor) -> float:
    log_p, log_q = log_probabilities(reference, windows), log_probabilities(model, windows)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("chunk_values", [1, 3 * VOCABULARY, 1 << 24])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_both_numbers_are_those_of_float64(
    windows: torch.Tensor, batch_size: int, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fxcalib.evaluation, "CHUNK_VALUES", chunk_values)
    model, other = make_model(0), make_model(1)
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(
        reference_perplexity(model, windows), rel=1e-5
    )
    assert kl_divergence(model, other, windows, batch_size=batch_size) == pytest.approx(
        reference_kl(model, other, windows), rel=1e-5
    )


def test_divergence_is_zero_to_itself_and_not_symmetric(windows: torch.Tensor) -> None:
    model, other = make_model(0), make_model(1)
    assert kl_divergence(model, copy.deepcopy(model), windows) == 0
    forward, backward = kl_divergence(model, other, windows), kl_divergence(other, model, windows)
    assert forward > 0 and abs(forward - backward) > 0.01 * forward


def test_perplexity_of_a_uniform_model_is_its_vocabulary(windows: torch.Tensor) -> None:
    model = make_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-6)


def test_divergence_in_bfloat16_stays_close_to_float64(windows: torch.Tensor) -> None:
    model, other = make_model(0).bfloat16(), make_model(1).bfloat16()
    assert kl_divergence(model, other, windows) == pytest.approx(reference_kl(model, other, windows), rel=1e-4)


def test_modes_of_all_modules_are_restored(windows: torch.Tensor) -> None:
    model = make_model(0).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, windows)
    assert [module.training for module in model.modules()] == before


def test_a_broken_model_is_reported_as_it_is(windows: torch.Tensor) -> None:
    model = make_model(0)
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, windows) == math.inf
    model.lm_head.weight.data.fill_(math.nan)
    assert math.isnan(perplexity(model, windows))


class Events(Progress):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def phase(self, name: str) -> None:
        self.seen.append(name)

    def sweep(self, subgraph: int, kind: str, batches: int) -> None:
        self.seen.append((kind, batches))

    def batch(self, tokens: int) -> None:
        self.seen.append(tokens)


def test_evaluation_of_checkpoints_on_a_file(tmp_path: Path) -> None:
    for name, seed in (("model", 0), ("reference", 1)):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = "\n".join(" ".join(f"w{1 + (i * j) % 39}" for j in range(1, 30)) for i in range(1, 5))
    (tmp_path / "text.txt").write_text(rows)
    events = Events()
    result = evaluate(
        tmp_path / "model",
        tmp_path / "reference",
        tmp_path / "text.txt",
        samples=4,
        seq_len=10,
        batch_size=3,
        progress=events,
    )
    assert events.seen == ["load", "evaluate", ("evaluate", 2), 30, 10]
    assert (result.tokens, result.source) == (40, "text.txt")
    windows = windows_of(tmp_path / "text.txt", samples=4, seq_len=10)
    assert result.perplexity == pytest.approx(reference_perplexity(make_model(0), windows), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(reference_perplexity(make_model(1), windows), rel=1e-5)
    assert result.kl == pytest.approx(reference_kl(make_model(0), make_model(1), windows), rel=1e-5)
    alone = evaluate(make_model(0), data=windows)
    assert alone.perplexity == result.perplexity
    assert alone.kl is None and alone.reference_perplexity is None


def windows_of(file: Path, samples: int, seq_len: int) -> torch.Tensor:
    from fxcalib.data import build, load_texts

    return torch.stack(build(load_texts(file), make_tokenizer(), samples=samples, seq_len=seq_len).samples)


def test_the_default_is_the_held_out_built_in_text() -> None:
    model = make_model(0)
    result = evaluate(model, tokenizer=make_tokenizer())
    assert result.source == "builtin text (heldout)"
    assert 512 <= result.tokens <= 64 * 512 and result.tokens % 512 == 0
    model.config.max_position_embeddings = 30
    assert evaluate(model, tokenizer=make_tokenizer()).tokens == 64 * 30


def test_the_value_prints_itself() -> None:
    alone = Evaluation(12.34567, None, None, 5120, 1.26, "x.txt")
    assert str(alone) == "perplexity 12.346, over 5,120 tokens of x.txt in 1.3 s"
    both = Evaluation(12.34567, 0.27361, 11.5, 5120, 1.26, "x.txt")
    assert str(both) == (
        "perplexity 12.346 (reference 11.500), KL to the reference 0.2736 nats per token, "
        "over 5,120 tokens of x.txt in 1.3 s"
    )


def test_bad_input(tmp_path: Path, windows: torch.Tensor) -> None:
    model = make_model(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty' has no config.json"):
        evaluate(tmp_path / "empty", data=windows)
    with pytest.raises(ModelError, match="the vocabularies of model and reference differ: 40 and 50 tokens"):
        evaluate(model, make_model(0, vocabulary=50), windows)
    with pytest.raises(BatchError, match="token id 60 in 'input_ids' of batch 0 is not in the model's vocabulary"):
        perplexity(model, torch.full((1, 4), 60))
    with pytest.raises(OptionError, match="pass tokenizer=, or windows as data="):
        evaluate(model)
    with pytest.raises(OptionError, match=r"windows have shape \(12,\) and dtype torch.int64"):
        perplexity(model, windows[0])
    with pytest.raises(OptionError, match=r"dtype torch.float32"):
        evaluate(model, data=windows.float())
    with pytest.raises(OptionError, match="batch_size is 0"):
        perplexity(model, windows, batch_size=0)
    with pytest.raises(DataError, match="fewer than the 99999 asked for"):
        evaluate(model, tokenizer=make_tokenizer(), samples=99999)
    with pytest.raises(ModelError, match="LlamaModel does not return logits"):
        perplexity(model.model, windows)


def test_tokenizers_that_differ_are_refused(tmp_path: Path, windows: torch.Tensor) -> None:
    for name, count in (("model", VOCABULARY), ("reference", VOCABULARY - 1)):
        make_model(0).save_pretrained(tmp_path / name)
        make_tokenizer(count).save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="the tokenizers of model and reference differ, for example in 'w39'"):
        evaluate(tmp_path / "model", tmp_path / "reference", windows)


def test_a_compressed_checkpoint_is_evaluated_beside_its_original(tmp_path: Path) -> None:
    make_model(0).save_pretrained(tmp_path / "original")
    make_tokenizer().save_pretrained(tmp_path / "original")
    model = make_model(0)
    round_to_nearest(model, "W4A16", group_size=8)
    checkpoint.save(model, tmp_path / "compressed", processor=make_tokenizer())
    windows = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    result = evaluate(tmp_path / "compressed", tmp_path / "original", windows)
    assert result.perplexity == pytest.approx(reference_perplexity(model, windows), rel=1e-4)
    assert result.kl == pytest.approx(reference_kl(model, make_model(0), windows), rel=1e-3)
    assert result.kl > 0.001
