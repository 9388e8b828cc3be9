"""Encoders and decoders put together from other models."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from benchmarks.zoo.configs import Correction, config_class, tiny_config
from benchmarks.zoo.inputs import Builder, with_decoder


def _composed(model_type: str, encoder: str, decoder: str) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        inner = {**tiny_config(decoder).to_dict(), "is_decoder": True, "add_cross_attention": True}
        made: PretrainedConfig = config_class(model_type)(encoder=tiny_config(encoder).to_dict(), decoder=inner)
        made.decoder_start_token_id, made.pad_token_id = 1, 0
        return made

    return make


CONFIGS: dict[str, Correction] = {}

FACTORIES: dict[str, Callable[[], PretrainedConfig]] = {
    "encoder-decoder": _composed("encoder-decoder", "bert", "bert"),
    "vision-encoder-decoder": _composed("vision-encoder-decoder", "vit", "gpt2"),
    "speech-encoder-decoder": _composed("speech-encoder-decoder", "wav2vec2", "bert"),
}

INPUTS: dict[str, Builder] = {
    "vision-encoder-decoder": with_decoder(lambda draw: {"pixel_values": draw.images(size=(32, 32))}),
    "speech-encoder-decoder": with_decoder(
        lambda draw: {"input_values": draw.normal(draw.rows, draw.pick(1600, 2100))}
    ),
}
