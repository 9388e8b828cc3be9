"""Default configs made tiny by rules on the names of their keys."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]
"""A config as nested plain values, as `PretrainedConfig.to_dict` gives it."""

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD_DIM, VOCABULARY = 64, 128, 4, 2, 16, 256
POSITIONS, WINDOW, IMAGE_SIZE, PATCH_SIZE = 128, 8, 32, 8
MOST_LAYERS = 6
"""How many layers are kept at most where layers differ in their settings."""

TOKEN_KEY = re.compile(r"(token_id|token_index|_token_ids|_start_id|_end_id|_newline_id|^im_.*id$|_token$|token_ids)$")
"""Config keys that hold ids of special tokens."""

DROPPED_KEYS = frozenset(
    {"transformers_version", "architectures", "id2label", "label2id", "_name_or_path", "dtype", "torch_dtype"}
)
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "depth")
LAYER_KEY = re.compile(
    r"(^|_)(num_layers|n_layers?|num_hidden_layers|hidden_layers|layers|depth|num_blocks|num_resampler_layers"
    r"|n_blocks)$"
)
KEY_VALUE_HEADS_KEY = re.compile(r"(key_value_heads|kv_heads|kv_n_heads|num_query_groups)$")
HEADS_KEY = re.compile(r"(heads|n_head|num_heads)$")
EXPERTS_KEY = re.compile(r"(^|_)(n_)?(num_)?(local_|routed_)?experts$")
VOCABULARY_KEY = re.compile(r"(vocab_size|vocab_size_per_layer_input)$")
POSITIONS_KEY = re.compile(
    r"(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len"
    r"|max_sequence_length|seq_len|context_length|max_pos_emb|model_max_length|max_length"
    r"|original_max_position_embeddings)$"
)
WINDOW_KEY = re.compile(r"(sliding_window|attention_chunk_size|attention_window_size|chunk_size|local_attention)$")
INTERMEDIATE_KEY = re.compile(
    r"(intermediate_size|ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|mlp_dim|intermediate_dim|d_inner"
    r"|intermediate_size_mlp|moe_intermediate_size|ffn_size|ffn_dims|expert_dim)$"
)
HIDDEN_KEY = re.compile(
    r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|hidden_dim|word_embed_proj_dim"
    r"|projection_dim|output_dim|decoder_hidden_size|lru_width|projector_hidden_size|projection_size|^dim)$"
)
HEAD_DIM_KEYS = frozenset(
    {
        "head_dim",
        "d_kv",
        "attention_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "index_head_dim",
        "global_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "kv_channels",
        "cross_head_dim",
        "dim_head",
        "d_head",
        "swa_head_dim",
        "swa_v_head_dim",
    }
)
TOP_K_KEYS = frozenset(
    {
        "num_experts_per_tok",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
        "moe_k",
        "top_k",
        "num_experts_per_token",
        "num_selected_experts",
        "experts_per_token",
    }
)
EXACT: Mapping[str, int] = {
    "qk_head_dim": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "image_size": IMAGE_SIZE,
    "img_size": IMAGE_SIZE,
    "crop_size": IMAGE_SIZE,
    "resolution": IMAGE_SIZE,
    "out_hidden_size": HIDDEN,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "rotary_dim": 8,
    "index_topk": 8,
    **dict.fromkeys(HEAD_DIM_KEYS, HEAD_DIM),
}
"""Key -> size, whatever the default is."""

AT_MOST: Mapping[str, int] = {
    "num_kv_shared_layers": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "patch_size": PATCH_SIZE,
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(TOP_K_KEYS, 2),
}
"""Key -> largest size."""


class Shrinker:
    """Shrinks one config with all its parts; ids of special tokens stay distinct within the small vocabulary."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def shrink(self, config: Mapping[str, Any]) -> Config:
        """A tiny copy of `config`; unknown keys keep their value."""
        source = dict(config)
        fixed = _keep_distinct_layers(source) | _keep_stages(source)
        heads = source.get("num_attention_heads", source.get("n_head", source.get("num_heads")))
        shrunk: Config = {}
        for key, value in source.items():
            if key in DROPPED_KEYS:
                continue
            if key in fixed or not isinstance(key, str) or key == "model_type":
                shrunk[key] = value
            elif isinstance(value, dict):
                shrunk[key] = _rope(value) if key in ("rope_parameters", "rope_scaling") else self.shrink(value)
            elif TOKEN_KEY.search(key) and not isinstance(value, str):
                shrunk[key] = self._token(value)
            elif isinstance(value, (list, tuple)):
                shrunk[key] = _sizes(key, value)
            elif isinstance(value, int) and not isinstance(value, bool):
                shrunk[key] = _size(key, value, source, heads)
            else:
                shrunk[key] = value
        return shrunk

    def _token(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._token(item) for item in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < 100:
            return value
        return self._tokens.setdefault(value, VOCABULARY - 1 - len(self._tokens))


def shrink(config: Mapping[str, Any]) -> Config:
    """A tiny copy of a whole config."""
    return Shrinker().shrink(config)


def _keep_distinct_layers(config: Config) -> set[str]:
    """Cut per-layer lists in `config` to a few layers of every kind; returns the keys that are settled by it."""
    depth_key = next((key for key in DEPTH_KEYS if isinstance(config.get(key), int) and config[key] > 3), None)
    if depth_key is None:
        return set()
    depth = config[depth_key]
    per_layer = [k for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == depth and k != "dims"]
    if not per_layer:
        return set()
    seen: set[tuple[str, ...]] = set()
    kept: list[int] = []
    for layer in range(depth):
        kind = tuple(_kind(config[key][layer]) for key in per_layer)
        if kind not in seen and len(kept) < MOST_LAYERS:
            seen.add(kind)
            kept.append(layer)
    if len(kept) < 2:
        kept = sorted({*kept, depth - 1})
    for key in per_layer:
        config[key] = [config[key][layer] for layer in kept]
    config[depth_key] = len(kept)
    return {key for key in DEPTH_KEYS if key in config}


def _keep_stages(config: Config) -> set[str]:
    """Keep as many layers of a backbone as it gives features of; returns the keys that are settled by it."""
    depth, stages = config.get("num_hidden_layers"), config.get("stage_names")
    if not isinstance(stages, (list, tuple)) or depth != len(stages) - 1 or depth < 3:
        return set()
    given = len(config.get("out_features") or ())
    kept = max(2, given)
    config["num_hidden_layers"] = kept
    config["out_features"] = [f"stage{kept - given + 1 + index}" for index in range(given)] or None
    del config["stage_names"]
    config.pop("out_indices", None)
    return {"num_hidden_layers"}


def _kind(setting: Any) -> str:
    if isinstance(setting, (str, bool)):
        return repr(setting)
    return "some" if setting else "none"


def _sizes(key: str, value: Any) -> Any:
    plain = all(isinstance(item, int) for item in value)
    if key in ("image_size", "img_size") and plain:
        return [IMAGE_SIZE] * len(value)
    if key == "patch_size" and plain:
        return [PATCH_SIZE] * len(value)
    return [4, 2, 2] if key == "mrope_section" else value


def _size(key: str, value: int, config: Mapping[str, Any], heads: Any) -> int:
    if LAYER_KEY.search(key) and "feat_extract" not in key:
        return min(value, 2)
    if key == "head_dim" and value and value == config.get("qk_rope_head_dim"):
        return 8
    if key == "qk_rope_head_dim":
        return 8 if value else 0
    if key in EXACT:
        return EXACT[key]
    if key in AT_MOST:
        return min(value, AT_MOST[key])
    if KEY_VALUE_HEADS_KEY.search(key):
        return value if value < 2 else (HEADS if heads == value else KEY_VALUE_HEADS)
    if HEADS_KEY.search(key) and "hash" not in key:
        return min(value, HEADS)
    if EXPERTS_KEY.search(key) and "shared" not in key and "per" not in key:
        return min(value, 4)
    if VOCABULARY_KEY.search(key):
        return VOCABULARY if value > 100 else value
    if POSITIONS_KEY.search(key):
        return min(value, POSITIONS)
    if WINDOW_KEY.search(key) and value > WINDOW and key != "chunk_size_feed_forward":
        return WINDOW
    if INTERMEDIATE_KEY.search(key):
        return min(value, INTERMEDIATE)
    return min(value, HIDDEN) if HIDDEN_KEY.search(key) else value


def _rope(parameters: Mapping[str, Any]) -> Config:
    shrunk = copy.deepcopy(dict(parameters))
    for key, value in shrunk.items():
        if isinstance(value, dict):
            shrunk[key] = _rope(value)
        elif key == "mrope_section":
            shrunk[key] = [4, 2, 2]
        elif key == "original_max_position_embeddings":
            shrunk[key] = 64
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            shrunk[key] = value[: HEAD_DIM // 2]
    return shrunk
