"""A real Llama model of 100,000 parameters with a tokenizer, and rounding to nearest done by hand."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128


def tiny_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, **options: object) -> LlamaForCausalLM:
    """Two decoder layers of width 64; widths that group sizes up to 64 divide."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        **options,
    }
    # as a checkpoint is loaded: `.to(dtype)` would convert the rotary frequencies as well
    return LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype).eval().requires_grad_(False)


def tiny_mixture(architecture: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A `Mixtral`, `Olmoe`, `Qwen3Moe` or `DeepseekV3` of two layers of width 64 with four experts."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
    }
    own = {
        "Mixtral": {"num_local_experts": 4},
        "Olmoe": {"num_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "head_dim": 16},
        "DeepseekV3": {
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32,
            "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{architecture}Config")(**settings, **own[architecture])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, ...: the ids of `VOCABULARY`."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny_llama(folder: Path, **options: object) -> LlamaForCausalLM:
    """Save a tiny Llama with its tokenizer to `folder` and return the model."""
    model = tiny_llama(**options)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def round_to_nearest(
    model: nn.Module, preset: str, *, group_size: int | None = None, ignore: tuple[str, ...] = ("lm_head",)
) -> None:
    """Leave the Linear layers of `model` as a calibration leaves them: weights on the grid, schemes attached."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ignore:
            scheme = preset_name_to_scheme(preset, ["Linear"])
            if group_size is not None:
                scheme.weights.group_size = group_size
            round_module(module, scheme)


def round_module(module: nn.Linear, scheme: QuantizationScheme) -> None:
    initialize_module_for_quantization(module, scheme)
    args = scheme.weights
    weight = module.weight.data
    if args.group_size:
        blocks = weight.unflatten(-1, (-1, args.group_size))
        low, high = blocks.amin(-1), blocks.amax(-1)
    else:
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        if args.strategy == QuantizationStrategy.TENSOR:
            low, high = low.amin().reshape(1), high.amax().reshape(1)
    scale, zero_point = calculate_qparams(low, high, args)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    module.weight_zero_point.data = zero_point.to(module.weight_zero_point.dtype).reshape(module.weight_scale.shape)
    if scheme.input_activations is not None and scheme.input_activations.dynamic is False:
        module.input_scale.data.fill_(0.05)
    # A new tensor: the weight may be tied to one that stays as it is.
    quantized = fake_quantize(weight, module.weight_scale, module.weight_zero_point, args)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    module.quantization_status = QuantizationStatus.DECOMPRESSED  # the weight is on the grid already
