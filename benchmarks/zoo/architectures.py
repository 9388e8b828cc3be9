"""Which architectures there are: every model class that an auto class of the installed transformers lists."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers.models.auto import modeling_auto

CATEGORIES: Mapping[str, str] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image_text_to_text": "IMAGE_TEXT_TO_TEXT",
    "speech_seq2seq": "SPEECH_SEQ_2_SEQ",
    "masked_lm": "MASKED_LM",
    "image_cls": "IMAGE_CLASSIFICATION",
    "audio_cls": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "multimodal": "MULTIMODAL_LM",
    "retrieval": "RETRIEVAL",
    "rnnt": "RNNT",
    "tdt": "TDT",
    "text_cls": "SEQUENCE_CLASSIFICATION",
    "token_cls": "TOKEN_CLASSIFICATION",
    "question_answering": "QUESTION_ANSWERING",
    "table_question_answering": "TABLE_QUESTION_ANSWERING",
    "document_question_answering": "DOCUMENT_QUESTION_ANSWERING",
    "visual_question_answering": "VISUAL_QUESTION_ANSWERING",
    "multiple_choice": "MULTIPLE_CHOICE",
    "next_sentence": "NEXT_SENTENCE_PREDICTION",
    "object_detection": "OBJECT_DETECTION",
    "zero_shot_object_detection": "ZERO_SHOT_OBJECT_DETECTION",
    "zero_shot_image_cls": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "image_segmentation": "IMAGE_SEGMENTATION",
    "semantic_segmentation": "SEMANTIC_SEGMENTATION",
    "instance_segmentation": "INSTANCE_SEGMENTATION",
    "universal_segmentation": "UNIVERSAL_SEGMENTATION",
    "mask_generation": "MASK_GENERATION",
    "image_matting": "IMAGE_MATTING",
    "depth_estimation": "DEPTH_ESTIMATION",
    "normal_estimation": "NORMAL_ESTIMATION",
    "pointmap_estimation": "POINTMAP_ESTIMATION",
    "pose_estimation": "POSE_ESTIMATION",
    "keypoint_detection": "KEYPOINT_DETECTION",
    "keypoint_matching": "KEYPOINT_MATCHING",
    "masked_image": "MASKED_IMAGE_MODELING",
    "causal_image": "CAUSAL_IMAGE_MODELING",
    "image_to_image": "IMAGE_TO_IMAGE",
    "text_recognition": "TEXT_RECOGNITION",
    "table_recognition": "TABLE_RECOGNITION",
    "video_cls": "VIDEO_CLASSIFICATION",
    "audio_frame_cls": "AUDIO_FRAME_CLASSIFICATION",
    "audio_xvector": "AUDIO_XVECTOR",
    "text_to_spectrogram": "TEXT_TO_SPECTROGRAM",
    "text_to_waveform": "TEXT_TO_WAVEFORM",
    "time_series_cls": "TIME_SERIES_CLASSIFICATION",
    "time_series_regression": "TIME_SERIES_REGRESSION",
    "time_series": "TIME_SERIES_PREDICTION",
    "decision": "DECISION",
    "pretraining": "PRETRAINING",
    "text_encoding": "TEXT_ENCODING",
    "image_features": "IMAGE",
    "backbone": "BACKBONE",
    "base": "",
}
"""Category -> the auto class, as in `MODEL_FOR_..._MAPPING_NAMES`."""

FIRST_OWNERS = ("image_text_to_text", "speech_seq2seq", "multimodal")
"""Categories that own a class before others that list it too, so that it gets images or sound besides text."""

REMOTE_CODE, PLAIN = "remote_code", "plain"
"""Categories of models that are defined outside of transformers: with and without a config."""


@dataclass(frozen=True)
class Architecture:
    """One model class in the category that owns it."""

    category: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        """`category/model_type/class`."""
        return f"{self.category}/{self.model_type}/{self.class_name}"


def architectures() -> list[Architecture]:
    """Every architecture once, by category; models that are defined outside of transformers come last."""
    from benchmarks.zoo.outside import PLAIN_MODELS, REMOTE_MODELS

    order = list(CATEGORIES)
    found: dict[str, Architecture] = {}
    for category in [*FIRST_OWNERS, *(c for c in order if c not in FIRST_OWNERS)]:
        for model_type, listed in _mapping(CATEGORIES[category]).items():
            for class_name in (listed,) if isinstance(listed, str) else listed:
                known = found.setdefault(class_name, Architecture(category, model_type, class_name))
                if known.category == category and _is_of(model_type, class_name):
                    found[class_name] = Architecture(category, model_type, class_name)
    listed_ones = sorted(found.values(), key=lambda architecture: order.index(architecture.category))
    outside = [Architecture(REMOTE_CODE, model_type, name) for model_type, name in REMOTE_MODELS.items()]
    outside += [Architecture(PLAIN, "module", name) for name in PLAIN_MODELS]
    return [*listed_ones, *outside]


def chosen(
    everything: Collection[Architecture], categories: Collection[str] | None = None, only: str | None = None
) -> list[Architecture]:
    """Those of `everything` in one of `categories` whose name the regular expression `only` finds."""
    pattern = re.compile(only or "")
    return [a for a in everything if (not categories or a.category in categories) and pattern.search(a.name)]


def _is_of(model_type: str, class_name: str) -> bool:
    """Whether a class has the name of the model type: other types may use it too."""
    return class_name.partition("For")[0].lower() == re.sub(r"[-_.]", "", model_type)


def _mapping(auto_class: str) -> Mapping[str, str | tuple[str, ...]]:
    name = f"MODEL_FOR_{auto_class}_MAPPING_NAMES" if auto_class else "MODEL_MAPPING_NAMES"
    mapping: Mapping[str, str | tuple[str, ...]] = getattr(modeling_auto, name, {})  # not all in every version
    return mapping
