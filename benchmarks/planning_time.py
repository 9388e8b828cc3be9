"""How long `fxcalib plan` takes for large models: from a folder that holds only config.json to the printed plan."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.environment import environment, pin_threads
from benchmarks.results import FOLDER, markdown, save

LLAMA_8B: dict[str, object] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
LLAMA_70B: dict[str, object] = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "Llama 8B, 32 layers": ("LlamaConfig", LLAMA_8B),
    "Llama 70B, 80 layers": ("LlamaConfig", LLAMA_70B),
    "DeepSeek-V3, 61 layers, 256 experts": ("DeepseekV3Config", {}),
}
"""Row -> config class of transformers and what differs from its defaults."""

ARCHITECTURES = {"LlamaConfig": "LlamaForCausalLM", "DeepseekV3Config": "DeepseekV3ForCausalLM"}

QUICK = ("Llama 8B, 32 layers",)
MASKS = ((512, 2048), (512, 8192))
"""Samples and tokens a sample for which the bytes of the attention mask are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="the smallest model only; saves no result")
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default: 1)")
    parser.add_argument("--text", action="store_true", help="print each plan too")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/planning_time.json)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and save the result."""
    pin_threads(arguments.threads)
    rows = [measure(name, arguments.text) for name in (QUICK if arguments.quick else MODELS)]
    masks = [masked(samples, length) for samples, length in MASKS]
    print(markdown(rows) + "\n\nA padded Llama 8B: what is stored between the first two layers\n\n" + markdown(masks))
    output: Path | None = arguments.output or (None if arguments.quick else FOLDER / "planning_time.json")
    if output:
        save(output, {"environment": environment(arguments.threads), "rows": rows, "masks": masks})


def write_config(name: str, folder: Path) -> Path:
    """Save config.json of one of `MODELS` to `folder`, as bfloat16, and return the folder."""
    import transformers

    cls, settings = MODELS[name]
    config = getattr(transformers, cls)(**settings, architectures=[ARCHITECTURES[cls]], dtype="bfloat16")
    config.save_pretrained(folder)
    return folder


def measure(name: str, show: bool = False) -> dict[str, object]:
    """Seconds to plan GPTQ W4A16 on 128 samples of 1024 tokens for one of `MODELS`, and what the plan says."""
    from fxcalib.api import plan

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(name, Path(scratch))
        started = time.perf_counter()
        found = plan(folder)
        text = str(found)
        seconds = time.perf_counter() - started
    if show:
        print(text)
    return {
        "model": name,
        "seconds": seconds,
        "lines": len(text.splitlines()),
        "parameters, 1e9": found.parameters / 1e9,
        "subgraphs": len(found.subgraphs),
        "host, GiB": found.peak("host").host_bytes / 2**30,
        "disk, GiB": found.disk_bytes / 2**30,
    }


def masked(samples: int, length: int) -> dict[str, object]:
    """Bytes that a padded Llama 8B carries from layer to layer, with and without its 4-D attention mask."""
    from fxcalib.api import plan

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config("Llama 8B, 32 layers", Path(scratch))
        found = plan(folder, samples=samples, seq_len=length, batch_size=4, pack=False, algorithm="gptq")
    stored = sum(value.total_bytes for value in found.subgraphs[0].carries)
    mask = sum(v.total_bytes for v in found.subgraphs[0].carries if v.dtype == "bool")
    return {
        "samples": samples,
        "tokens": length,
        "stored, GiB": stored / 2**30,
        "of it the 2-D mask, GiB": mask / 2**30,
        "4-D mask, not stored, GiB": found.saved_by_recomputing / 2**30,
    }
