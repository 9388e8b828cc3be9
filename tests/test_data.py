"""Texts to samples to batches: packing, choosing, padding, fingerprints, and what is said about data that is wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fxcalib.data import CalibrationData, batches, build, fingerprint_batches
from fxcalib.errors import DataError, OptionError
from fxcalib.sources import Stream, Texts

WORDS = [f"w{i}" for i in range(50)]
EOS, PAD, BOS = 0, 1, 2


def make_tokenizer(**settings: object) -> PreTrainedTokenizerFast:
    """One token per word: `w0` is 4; ends are 0, padding 1, beginnings 2."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<bos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **settings})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def document(first: int, length: int) -> str:
    return " ".join(WORDS[(first + i) % len(WORDS)] for i in range(length))


def test_packed_windows_are_the_documents_joined_by_the_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    data = build([document(0, 3)], tokenizer, samples=1, seq_len=4)
    assert [sample.tolist() for sample in data.samples] == [[4, 5, 6, EOS]]
    two = build([document(0, 3), document(10, 3)], tokenizer, samples=1, seq_len=8)
    assert two.samples[0].tolist() in ([4, 5, 6, EOS, 14, 15, 16, EOS], [14, 15, 16, EOS, 4, 5, 6, EOS])


def test_packed_batches_have_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    data = build([document(i, 7) for i in range(20)], tokenizer, samples=5, seq_len=9)
    loaded = batches(data, 2)
    assert [tuple(batch["input_ids"].shape) for batch in loaded] == [(2, 9), (2, 9), (1, 9)]
    assert all(batch["attention_mask"].all() and batch["input_ids"].dtype == torch.int64 for batch in loaded)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in loaded]), torch.stack(data.samples))
    assert data.tokens == 45


def test_one_long_document_gives_windows_from_all_over_it(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(random.Random(0).choices(WORDS, k=5000))
    row = tokenizer(text, add_special_tokens=False).input_ids
    data = build([text], tokenizer, samples=8, seq_len=50)
    starts = {
        start for sample in data.samples for start in range(0, 5000, 50) if row[start : start + 50] == list(sample)
    }
    assert len(starts) == 8
    assert max(starts) >= 8 * 50


@pytest.mark.parametrize("pack", [True, False])
def test_the_seed_decides(tokenizer: PreTrainedTokenizerFast, pack: bool) -> None:
    texts = [document(3 * i, 5 + i) for i in range(30)]
    first = build(texts, tokenizer, samples=8, seq_len=6, seed=1, pack=pack)
    again = build(texts, tokenizer, samples=8, seq_len=6, seed=1, pack=pack)
    other = build(texts, tokenizer, samples=8, seq_len=6, seed=2, pack=pack)
    assert [s.tolist() for s in first.samples] == [s.tolist() for s in again.samples]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.describe() == {
        "source": "given texts",
        "fingerprint": first.fingerprint,
        "samples": 8,
        "tokens": first.tokens,
        "packed": pack,
        "seed": 1,
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_are_padded_on_the_tokenizers_side(side: str) -> None:
    tokenizer = make_tokenizer(padding_side=side)
    data = build([document(0, 2), document(10, 9)], tokenizer, samples=2, seq_len=5, pack=False)
    (batch,) = batches(data, 2)
    rows = {tuple(row) for row in batch["input_ids"].tolist()}
    short = (PAD, PAD, BOS, 4, 5) if side == "left" else (BOS, 4, 5, PAD, PAD)
    assert rows == {short, (BOS, 14, 15, 16, 17)}
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())


def test_without_a_padding_token_the_end_of_sequence_pads() -> None:
    tokenizer = make_tokenizer(pad_token=None)
    data = build([document(0, 2), document(10, 4)], tokenizer, samples=2, seq_len=5, pack=False)
    (batch,) = batches(data, 2)
    assert (batch["input_ids"] == EOS).sum() == 2 == (batch["attention_mask"] == 0).sum()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    samples=st.integers(1, 12),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_packing_gives_exactly_what_was_asked_or_says_how_much_there_is(
    lengths: list[int], samples: int, seq_len: int, batch_size: int, seed: int
) -> None:
    tokenizer = make_tokenizer()
    texts = [document(7 * i, length) for i, length in enumerate(lengths)]
    available = sum(length + 1 for length in lengths) // seq_len
    if available < samples:
        with pytest.raises(DataError, match=f"given texts gives {available} samples of {seq_len} tokens"):
            build(texts, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
        return
    data = build(texts, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    assert [len(sample) for sample in data.samples] == [seq_len] * samples
    assert sum(batch["attention_mask"].sum().item() for batch in batches(data, batch_size)) == samples * seq_len


def test_fewer_samples_than_asked_names_what_there_is_and_what_to_change(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Texts((document(0, 39),), "news.txt")
    with pytest.raises(DataError) as caught:
        build(texts, tokenizer, samples=5, seq_len=10)
    assert str(caught.value) == (
        "news.txt gives 4 samples of 10 tokens (40 tokens in all), fewer than the 5 asked for; "
        "use 4 samples, a sequence length of at most 8, or more text"
    )
    with pytest.raises(DataError) as caught:
        build(texts, tokenizer, samples=2, seq_len=10, pack=False)
    assert str(caught.value) == (
        "news.txt has 1 documents, fewer than the 2 samples asked for; use 1 sample, more documents, or packed samples"
    )
    assert len(build(texts, tokenizer, samples=5, seq_len=10, at_most=True).samples) == 4
    with pytest.raises(DataError, match="gives 0 samples of 100 tokens"):
        build(texts, tokenizer, samples=5, seq_len=100, at_most=True)


def test_empty_data_and_numbers_below_one(tokenizer: PreTrainedTokenizerFast) -> None:
    for empty in ([], ["", "  \n"]):
        with pytest.raises(DataError, match="given texts has no text"):
            build(empty, tokenizer, samples=1, seq_len=1)
    with pytest.raises(OptionError, match="samples is 0; it must be at least 1"):
        build(["w1"], tokenizer, samples=0, seq_len=1)
    with pytest.raises(OptionError, match="seq_len is -1"):
        build(["w1"], tokenizer, samples=1, seq_len=-1)
    with pytest.raises(OptionError, match="batch_size is 0"):
        batches(build(["w1"], tokenizer, samples=1, seq_len=1), 0)
    with pytest.raises(DataError, match="no tokenizer"):
        build(["w1"], None, samples=1, seq_len=1)


def test_a_processor_is_as_good_as_its_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    direct = build([document(0, 20)], tokenizer, samples=2, seq_len=5)
    assert build([document(0, 20)], processor, samples=2, seq_len=5).fingerprint == direct.fingerprint


def test_the_value_prints_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    data = build(Texts((document(0, 20),), "news.txt"), tokenizer, samples=2, seq_len=5)
    assert str(data) == f"2 samples of 5 tokens from news.txt ({data.fingerprint[:12]})"
    uneven = CalibrationData((torch.zeros(3), torch.zeros(5)), "x", "abc", 0, False, 0, "left")
    assert str(uneven) == "2 samples of 3 to 5 tokens from x (abc)"


def test_fingerprints_of_batches_see_every_difference() -> None:
    ids = torch.arange(12).reshape(2, 6)
    base = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    same = [{"attention_mask": torch.ones_like(ids), "input_ids": ids.clone()}]
    assert fingerprint_batches(base) == fingerprint_batches(iter(same))
    others = [
        [{"input_ids": ids.reshape(3, 4), "attention_mask": torch.ones_like(ids)}],
        [{"input_ids": ids.int(), "attention_mask": torch.ones_like(ids)}],
        [{"input_ids": ids + (ids == 3), "attention_mask": torch.ones_like(ids)}],
        [{"input_ids": ids}],
        [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}],
        [{"input_ids": ids[1:]}, {"input_ids": ids[:1]}],
        [{"input_ids": ids, "pixel_values": [ids.bfloat16(), None]}],
    ]
    assert len({fingerprint_batches(b) for b in [base, *others]}) == len(others) + 1


def test_batches_of_documents_hold_samples_of_similar_length(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [3, 20, 4, 19, 5, 21]
    texts = [document(i, length) for i, length in enumerate(lengths)]
    data = build(texts, tokenizer, samples=6, seq_len=64, pack=False)
    loaded = batches(data, 2)
    assert [batch["attention_mask"].sum(1).tolist() for batch in loaded] == [[22, 21], [20, 6], [5, 4]]
    assert [batch["input_ids"].shape[1] for batch in loaded] == [22, 20, 5]
    again = batches(build(texts, tokenizer, samples=6, seq_len=64, pack=False), 2)
    assert fingerprint_batches(loaded) == fingerprint_batches(again)


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_is_read_as_far_as_it_is_needed(tokenizer: PreTrainedTokenizerFast, pack: bool) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        for i in itertools.count():
            taken.append(i)
            yield document(i, 9)

    texts = Texts(Stream(endless), "endless")
    data = build(texts, tokenizer, samples=4, seq_len=10, pack=pack)
    assert len(data.samples) == 4
    assert len(taken) == 4
    assert data.fingerprint == build(texts, tokenizer, samples=4, seq_len=10, pack=pack).fingerprint
    assert str(texts) == "documents streamed from endless"
    short = Texts(Stream(lambda: iter(["w1 w2"])), "short")
    with pytest.raises(DataError, match=r"short (gives 0|has 1)"):
        build(short, tokenizer, samples=2, seq_len=10, pack=pack)
