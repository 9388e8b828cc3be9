"""Rows with images or sound through processors of transformers, made here from their parts."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fxcalib import GPTQModifier, calibrate
from fxcalib.data import multimodal_batches
from fxcalib.errors import DataError, OptionError

IMAGE, AUDIO = "<image>", "<|AUDIO|>"
SPECIAL = ["<pad>", "</s>", IMAGE, AUDIO, "<|audio_bos|>", "<|audio_eos|>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(20)]
TEMPLATE = (
    "{% for m in messages %}{{ ' <' + m['role'] + '> ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% elif part['type'] == 'audio' %}"
    "{{ ' <|audio_bos|><|AUDIO|><|audio_eos|> ' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SIDE, PATCH = 28, 14
PATCHES = (SIDE // PATCH) ** 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
    )


@pytest.fixture(scope="module")
def vision() -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def hearing() -> Qwen2AudioProcessor:
    return Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        tokenizer=make_tokenizer(),
        chat_template=TEMPLATE,
    )


def picture(shade: int) -> Image.Image:
    return Image.fromarray(numpy.full((20, 30, 3), shade, dtype=numpy.uint8))


def image_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "images": [picture(10 * i)],
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 1}"},
                {"role": "assistant", "content": " ".join(WORDS[: 1 + i])},
            ],
        }
        for i in range(count)
    ]


def test_images_and_messages(vision: LlavaProcessor) -> None:
    rows = image_rows(3)
    made = multimodal_batches(rows, vision, batch_size=2)
    assert len(made) == 2
    first, last = list(made)
    assert first["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert last["pixel_values"].shape == (1, 3, SIDE, SIDE)
    image = vision.tokenizer.convert_tokens_to_ids(IMAGE)
    assert ((first["input_ids"] == image).sum(1) == PATCHES).all()
    assert first["input_ids"].shape == first["attention_mask"].shape
    assert first["attention_mask"].sum() < first["attention_mask"].numel()
    parts = [{"type": "text", "text": "w0 w1", "extra": None}, {"type": "image", "text": None}]
    named = {**rows[0], "messages": [{"role": "user", "content": parts}]}
    (alone,) = multimodal_batches([named], vision)
    tokens = vision.tokenizer.convert_ids_to_tokens(alone["input_ids"][0])
    assert tokens.index("w0") < tokens.index(IMAGE)


def test_text_with_placeholders_and_dtypes(vision: LlavaProcessor) -> None:
    rows = [{"image": picture(3), "text": "<image> w1 w2"}]
    (batch,) = multimodal_batches(rows, vision, dtype=torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("bare", [True, False])
def test_sound_and_messages(hearing: Qwen2AudioProcessor, bare: bool) -> None:
    wave = numpy.sin(numpy.arange(8000) / 9).astype(numpy.float32)
    audio = wave if bare else {"array": wave, "sampling_rate": 16000}
    rows = [{"audio": audio, "messages": [{"role": "user", "content": "w3"}]} for _ in range(2)]
    (batch,) = multimodal_batches(rows, hearing, batch_size=2)
    assert batch["input_features"].shape[:2] == (2, 8)
    sound = hearing.tokenizer.convert_tokens_to_ids(AUDIO)
    assert ((batch["input_ids"] == sound).sum(1) > 1).all()


def test_rows_are_chosen_by_seed_and_read_when_asked_for(vision: LlavaProcessor) -> None:
    read: list[int] = []

    class Rows(list[dict[str, Any]]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    rows = Rows(image_rows(12))
    made = multimodal_batches(rows, vision, samples=4, seed=1)
    assert read == []
    next(iter(made))
    assert len(read) == 1
    assert made.order == multimodal_batches(rows, vision, samples=4, seed=1).order
    assert made.order != multimodal_batches(rows, vision, samples=4, seed=2).order
    first, second = list(made), list(made)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


def test_rows_that_do_not_work(vision: LlavaProcessor, hearing: Qwen2AudioProcessor) -> None:
    with pytest.raises(OptionError, match="batch_size is 0; it must be at least 1"):
        multimodal_batches(image_rows(1), vision, batch_size=0)
    with pytest.raises(DataError, match="there are 1 rows, fewer than the 2 asked for"):
        multimodal_batches(image_rows(1), vision, samples=2)
    with pytest.raises(DataError, match="row 0 has neither 'messages' nor 'text'; its keys are 'images', 'caption'"):
        list(multimodal_batches([{"images": [picture(1)], "caption": "w1"}], vision))
    with pytest.raises(DataError, match=r"LlavaProcessor refuses rows 0, 1: .*; look at their text, which must hold"):
        list(multimodal_batches([{"image": "none.png", "text": IMAGE}] * 2, vision, batch_size=2))
    waves = [{"array": numpy.zeros(800, dtype=numpy.float32), "sampling_rate": rate} for rate in (8000, 16000)]
    rows = [{"audio": wave, "text": f"<|audio_bos|>{AUDIO}<|audio_eos|>"} for wave in waves]
    with pytest.raises(DataError, match=r"rows 0, 1 have the sampling rates \[8000, 16000\]; resample them to one"):
        list(multimodal_batches(rows, hearing, batch_size=2))
    with pytest.raises(DataError, match=r"refuses row 0: .*sampling rate"):
        list(multimodal_batches(rows, hearing))
    bare = LlavaProcessor(image_processor=vision.image_processor, tokenizer=make_tokenizer(), image_token=IMAGE)
    with pytest.raises(DataError, match="row 0 holds messages, but LlavaProcessor has no chat template to write them"):
        list(multimodal_batches(image_rows(1), bare))


def test_a_vision_language_model_is_calibrated_on_such_batches(vision: LlavaProcessor) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=eyes, text_config=text, image_token_id=vision.tokenizer.convert_tokens_to_ids(IMAGE)
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    modifier = GPTQModifier(scheme="W8A8", targets="re:.*language_model.*(proj)$")
    report = calibrate(model, multimodal_batches(image_rows(4), vision, batch_size=2), modifier)
    assert report.samples == 4
    assert len(report.modules) == 7
