"""Chats and prompts with completions: what becomes of them, and which of their tokens are completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fxcalib import GPTQModifier, calibrate, quantize
from fxcalib.chat import Chat, ChatTokenizer, Completion, Document, chat_template
from fxcalib.data import batches, build
from fxcalib.errors import DataError
from fxcalib.sources import load_texts

PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN
COUNTING = "{{ messages|length }}" + PLAIN


def make_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """One token for each character and each mark of a template."""
    marks = ["</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *(chr(c) for c in range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", additional_special_tokens=marks[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str) -> Chat:
    roles = ["user", "assistant"]
    return Chat(tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents)))


def completion_of(document: Document, template: str | None = PLAIN) -> str:
    tokenizer = make_tokenizer(template)
    ids, marks = ChatTokenizer(tokenizer, template, marked=True)(document, special_tokens=True)
    assert marks is not None and len(marks) == len(ids)
    return str(tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark]))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_is_completion_with_and_without_marks(template: str) -> None:
    assert completion_of(chat("hi", "yes", "and", "no way"), template) == "yes</s>no way</s>"
    assert completion_of(chat("hi", "yes", "and"), template) == "yes</s>"
    told = Chat(({"role": "system", "content": "be"}, {"role": "assistant", "content": "I"}))
    assert completion_of(told, template) == "I</s>"
    assert completion_of(Chat(({"role": "assistant", "content": "I"},)), template).endswith("I</s>")


def test_a_head_that_the_template_writes_for_generation_only_is_part_of_the_turn() -> None:
    thinking = PLAIN.replace("'<assistant>' }}{% endif %}", "'<assistant>?' }}{% endif %}")
    assert completion_of(chat("hi", "yes"), thinking) == "<assistant>yes</s>"


def test_completions_follow_their_prompt() -> None:
    assert completion_of(Completion("2+2=", " 4")) == " 4"
    assert completion_of(Completion("", "all")) == "all"
    assert Completion("title", "body").text == "title\nbody"
    assert completion_of(Completion("title", "body")) == "body"


def test_errors_of_chats() -> None:
    with pytest.raises(DataError, match="but the tokenizer has no chat template to write them as text: take the model"):
        ChatTokenizer(make_tokenizer(None), None)(chat("hi"), special_tokens=True)
    with pytest.raises(DataError, match="refuses the chat 'I': begin with the user; leave such rows out"):
        completion_of(Chat(({"role": "assistant", "content": "I"},)), STRICT)
    with pytest.raises(DataError, match=r"in another way when more follows.*put \{% generation %\} around them"):
        completion_of(chat("hi", "yes"), COUNTING)


def test_the_template_of_a_processor_or_by_name() -> None:
    class Processor:
        tokenizer = make_tokenizer()
        chat_template: Any = None

    assert chat_template(Processor()) == PLAIN
    Processor.chat_template = MARKED
    assert chat_template(Processor()) == MARKED
    Processor.chat_template = {"default": STRICT, "tools": PLAIN}
    assert chat_template(Processor()) == STRICT
    assert chat_template(make_tokenizer(None)) is None


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_columns_say_what_a_document_is(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    expected = Chat(tuple(messages))
    for name, rows in (("messages", messages), ("conversations", shared)):
        file = write(tmp_path / f"{name}.jsonl", {name: rows, "n": 1})
        assert load_texts(file).documents == (expected,)
        assert load_texts(file, column=name).documents == (expected,)
    pair = write(tmp_path / "pair.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None})
    assert load_texts(pair).documents == (Completion("a", "b"),)
    several = write(tmp_path / "several.jsonl", {"title": "t", "input": None, "output": "o"})
    assert load_texts(several, column="title,input,output").documents == (Completion("t", "o"),)
    assert load_texts(several, column=["title", "output"]).documents == (Completion("t", "o"),)
    assert load_texts(write(tmp_path / "text.jsonl", {"messages": messages, "text": "x"})).documents == ("x",)
    with pytest.raises(DataError, match=r"row 1 of .* holds keys 'a' where a message was expected"):
        load_texts(write(tmp_path / "bad.jsonl", {"messages": [{"a": 1}]}))
    with pytest.raises(DataError, match="has no column 'body'; its columns are 'title', 'input', 'output'"):
        load_texts(several, column="title,body")


def test_chats_from_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    assert load_texts(tmp_path / "a.parquet").documents == (Chat(tuple(messages)),)


def test_packed_and_padded_samples_have_masks_where_completions_are_asked_for() -> None:
    documents = [chat("u" * (3 + i), "a" * (5 + i)) for i in range(12)]
    tokenizer = make_tokenizer()
    packed = build(documents, tokenizer, samples=4, seq_len=16, completion_only=True)
    assert packed.loss_masks is not None
    for sample, mask in zip(packed.samples, packed.loss_masks, strict=True):
        assert mask.any()
        for token, counts in zip(tokenizer.convert_ids_to_tokens(sample), mask.tolist(), strict=True):
            assert {"a": counts, "u": not counts, "<user>": not counts, "<assistant>": not counts}.get(token, True)
    assert packed.describe()["completion_tokens"] == sum(int(mask.sum()) for mask in packed.loss_masks)
    padded = build(documents, tokenizer, samples=4, seq_len=64, pack=False, completion_only=True)
    for batch in batches(padded, 2):
        chosen = batch["input_ids"][batch["loss_mask"].bool()]
        assert set(tokenizer.convert_ids_to_tokens(chosen)) == {"a", "</s>"}
        assert not (batch["loss_mask"] & ~batch["attention_mask"]).any()
    plain = build(documents, tokenizer, samples=4, seq_len=64, pack=False)
    assert plain.loss_masks is None and "loss_mask" not in batches(plain)[0]
    assert plain.fingerprint != padded.fingerprint


def test_samples_without_completion_are_not_taken() -> None:
    documents = [chat("u" * 30, "a"), chat("u", "a" * 8)]
    data = build(documents, make_tokenizer(), samples=2, seq_len=10, pack=False, at_most=True, completion_only=True)
    assert len(data.samples) == 1
    with pytest.raises(DataError, match="has 1 documents with completion in the first 10 tokens, fewer than the 2"):
        build(documents, make_tokenizer(), samples=2, seq_len=10, pack=False, completion_only=True)
    with pytest.raises(DataError, match="given texts holds plain text, in which nothing is completion; name a column"):
        build(["plain"], make_tokenizer(), samples=1, seq_len=4, completion_only=True)


def test_only_tokens_in_the_loss_mask_count_for_statistics() -> None:
    """A run with a loss mask gives what one gives that has only those tokens in its Hessians."""
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, 24))
    mask = torch.zeros(2, 24, dtype=torch.int64)
    mask[0, :9] = mask[1, :15] = 1  # causal: later tokens do not change those before them
    masked, padded, whole = tiny_llama(), tiny_llama(), tiny_llama()
    for model, batch in (
        (masked, {"input_ids": ids, "loss_mask": mask}),
        (padded, {"input_ids": ids, "attention_mask": mask}),
        (whole, {"input_ids": ids}),
    ):
        calibrate(model, [batch], GPTQModifier(scheme="W4A16", group_size=32))
    weights = [model.model.layers[0].mlp.down_proj.weight for model in (masked, padded, whole)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[0], weights[2], rtol=1e-3, atol=1e-4)


def test_a_loss_mask_and_padding_work_together_in_every_batch() -> None:
    ids = torch.randint(3, 128, (2, 16))
    real = torch.ones(2, 16, dtype=torch.int64)
    real[1, 10:] = 0
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    answers = torch.zeros(2, 16, dtype=torch.bool)
    answers[:, 4:12] = True
    given = [
        {"input_ids": ids, "attention_mask": real, "loss_mask": answers},
        {"input_ids": ids, "attention_mask": real, "loss_mask": nothing},
    ]
    both, joined = tiny_llama(), tiny_llama()
    report = calibrate(both, given, GPTQModifier(scheme="W8A8"))
    calibrate(joined, [{**given[0], "loss_mask": answers & real.bool()}], GPTQModifier(scheme="W8A8"))
    assert report.tokens == 2 * int(real.sum())
    for one, other in zip(both.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_quantize_on_chats(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    tokenizer = make_tokenizer(MARKED)
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [{"messages": list(chat("abc" * i, "xyz" * i).messages)} for i in range(1, 9)]
    data = write(tmp_path / "chats.jsonl", *rows)
    settings: dict[str, Any] = {"data": data, "group_size": 32, "samples": 4, "seq_len": 32}
    report = quantize(tmp_path / "tiny", **settings, completion_only=True, output=tmp_path / "out")
    assert 0 < report.data["completion_tokens"] < report.tokens  # type: ignore[operator]
    whole = quantize(tmp_path / "tiny", **settings, output=tmp_path / "whole")
    assert whole.tokens == 4 * 32
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert first != second
