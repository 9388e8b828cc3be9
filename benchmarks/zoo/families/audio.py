"""Sound: encoders, speech to text, and language models that listen."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo.configs import Correction
from benchmarks.zoo.inputs import Batch, Builder, Draw, decoder_text, frames, spliced_text, text_batch, token_of
from benchmarks.zoo.inputs import with_decoder as decoding
from benchmarks.zoo.multimodal import AUDIO_TOKEN_KEYS, audio_language
from benchmarks.zoo.shrinking import Config


def _waveform_encoder(config: Config) -> Config:
    if isinstance(config.get("conv_dim"), (list, tuple)):
        config["conv_dim"] = [32] * len(config["conv_dim"])
    config.update(
        num_feat_extract_layers=len(config["conv_dim"]),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    if "tdnn_dim" in config:
        config["tdnn_dim"] = [32] * len(config["tdnn_dim"])
    return config


_GRANITE: Correction = {
    "encoder_config": {"context_size": 16, "max_pos_emb": 32, "output_dim": 42},
    "window_size": 4,
    "downsample_rate": 2,
    "projector_config": {"encoder_hidden_size": 64},
}

CONFIGS: dict[str, Correction] = {
    **dict.fromkeys(
        (
            "data2vec-audio",
            "hubert",
            "sew",
            "sew-d",
            "unispeech",
            "unispeech-sat",
            "wav2vec2",
            "wavlm",
            "speecht5",
        ),
        _waveform_encoder,
    ),
    "wav2vec2-conformer": lambda config: {**_waveform_encoder(config), "vocab_size": 32},
    "wav2vec2-bert": {"vocab_size": 32, "max_source_positions": 128},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "speech_to_text": {"conv_channels": 64, "max_source_positions": 256, "input_feat_per_channel": 24},
    "moonshine": {
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "moonshine_streaming": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "dia": {
        "decoder_config": {
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
            "cross_head_dim": 16,
            "cross_hidden_size": 64,
        }
    },
    "granite_speech": _GRANITE,
    "granite_speech_plus": _GRANITE,
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 6400},
    "voxtral": {"audio_token_id": 255},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 4, "num_filters": 8}},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 250,
        "audio_start_token_id": 249,
        "vision_config": {"out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]},
        "audio_config": {"output_dim": 64},
    },
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 250,
        "audio_start_token_id": 249,
        "vision_config": {"out_hidden_size": 64},
        "audio_config": {"output_dim": 64},
    },
}


def _encoder(draw: Draw) -> Any:
    return getattr(draw.config, "encoder_config", draw.config)


def _bins(draw: Draw) -> int:
    return int(_encoder(draw).num_mel_bins)


def _projected(draw: Draw) -> int:
    config: Any = draw.config
    return int(config.feature_projection_input_dim)


def _speech_bins(draw: Draw) -> int:
    config: Any = draw.config
    return int(config.input_feat_per_channel)


def _spectrogram(lengths: tuple[int, int] | None = None) -> Builder:
    """Log-mel spectrograms (rows, bins, frames), with masks of ones where the model takes them."""

    def build(draw: Draw) -> Batch:
        config = getattr(draw.config, "audio_config", None) or getattr(draw.config, "encoder_config", None)
        length = lengths[draw.second] if lengths else 2 * getattr(config, "max_source_positions", 64)
        batch = {"input_features": draw.normal(draw.rows, getattr(config, "num_mel_bins", 80), length)}
        for name in ("input_features_mask", "feature_attention_mask"):
            if draw.accepts(name):
                batch[name] = torch.ones(draw.rows, length, dtype=torch.long)
        return batch

    return build


def _classified_spectrogram(draw: Draw) -> Batch:
    config: Any = draw.config
    return {"input_values": draw.normal(draw.rows, config.max_length, config.num_mel_bins)}


def _dia(draw: Draw) -> Batch:
    config: Any = draw.config
    channels = config.decoder_config.num_channels
    return {**text_batch(draw), "decoder_input_ids": draw.integers(0, 200, draw.rows, draw.pick(7, 10), channels)}


def _granite(draw: Draw) -> Batch:
    return {
        "input_features": draw.normal(draw.rows, 16, _encoder(draw).input_dim),
        "input_features_mask": torch.ones(draw.rows, 8, dtype=torch.bool),
    }


def _fun_asr(draw: Draw) -> Batch:
    config: Any = draw.config
    length = draw.pick(16, 24)
    bins = config.audio_config.num_mel_bins * config.audio_config.num_stacked_frames
    return {
        "input_features": draw.normal(draw.rows, length, bins),
        "input_features_mask": torch.ones(draw.rows, length, dtype=torch.long),
    }


def _music_flamingo(draw: Draw) -> Batch:
    """Its features depend on the text: one to four frames."""
    sound = _spectrogram()(draw)
    tokens = sound["input_features"].shape[-1] // 4
    return {**spliced_text(draw, [tokens] * draw.rows, token_of(draw.config, AUDIO_TOKEN_KEYS)), **sound}


def _qwen2_audio(draw: Draw) -> Batch:
    config: Any = draw.config
    length = 2 * config.audio_config.max_source_positions
    tokens = ((length - 1) // 2 + 1) // 2
    return {
        **spliced_text(draw, [tokens] * draw.rows, token_of(draw.config, AUDIO_TOKEN_KEYS)),
        "input_features": draw.normal(draw.rows, config.audio_config.num_mel_bins, length),
        "feature_attention_mask": torch.ones(draw.rows, length, dtype=torch.long),
    }


def _kyutai(draw: Draw) -> Batch:
    config: Any = draw.config
    length = draw.pick(12, 17)
    return {
        "input_ids": draw.integers(4, 200, draw.rows, length, config.num_codebooks + 1),
        "attention_mask": torch.ones(draw.rows, length, dtype=torch.long),
    }


def _pop2piano(draw: Draw) -> Batch:
    config: Any = draw.config
    return {
        "input_features": draw.normal(draw.rows, draw.pick(12, 17), config.d_model),
        **decoder_text(draw, mask=False),
    }


_SEAMLESS = decoding(frames(_projected))
_CTC = frames(_bins, (64, 96))

INPUTS: dict[str, Builder] = {
    "wav2vec2-bert": frames(_projected),
    "audio-spectrogram-transformer": _classified_spectrogram,
    "lasr_ctc": _CTC,
    "parakeet_ctc": _CTC,
    "granite_speech5_ctc": frames(lambda draw: 320, (64, 96)),
    "parakeet_rnnt": decoding(_CTC),
    "parakeet_tdt": decoding(_CTC),
    "nemotron3_5_asr": decoding(_CTC),
    "nemotron_asr_streaming": decoding(_CTC),
    "canary": decoding(_CTC),
    "cohere_asr": decoding(_CTC),
    "speech_to_text": decoding(frames(_speech_bins)),
    "SeamlessM4TForSpeechToText": _SEAMLESS,
    "SeamlessM4Tv2ForSpeechToText": _SEAMLESS,
    "moonshine": decoding(lambda draw: {"input_values": draw.normal(draw.rows, draw.pick(8000, 10000))}, mask=False),
    "pop2piano": _pop2piano,
    "dia": _dia,
    **dict.fromkeys(("audioflamingo3", "glmasr", "voxtral"), audio_language(_spectrogram())),
    "musicflamingo": _music_flamingo,
    "qwen3_asr": audio_language(_spectrogram((100, 200))),
    "granite_speech": audio_language(_granite),
    "granite_speech_plus": audio_language(_granite),
    "fun_asr_nano": audio_language(_fun_asr),
    "qwen2_audio": _qwen2_audio,
    "kyutai_speech_to_text": _kyutai,
}
