"""How long tracing and partitioning take, on models of published sizes whose weights are on the meta device."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import environment, idle_warning, pin_threads
from benchmarks.planning_time import LLAMA_8B, MODELS
from benchmarks.results import FOLDER, markdown, save

if TYPE_CHECKING:
    from torch import nn

QWEN3_MOE: dict[str, object] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


@dataclass(frozen=True)
class Case:
    """One row: a model and where it is cut."""

    name: str
    config: str
    """Config class of transformers."""
    settings: dict[str, object] = field(default_factory=dict)
    """What differs from its defaults."""
    targets: str | None = None
    """Targets; None: the layers."""


def depth(layers: int) -> Case:
    """A Llama 8B with this many layers."""
    return Case(f"Llama 8B, {layers} layers", "LlamaConfig", {**LLAMA_8B, "num_hidden_layers": layers})


LARGE = (
    Case("Llama 70B, 80 layers", *MODELS["Llama 70B, 80 layers"]),
    Case("DeepSeek-V3, 61 layers, 256 experts", *MODELS["DeepSeek-V3, 61 layers, 256 experts"]),
    Case("Qwen3-MoE, 48 layers, 128 experts", "Qwen3MoeConfig", QWEN3_MOE),
    Case("Llama 8B, 32 layers", *MODELS["Llama 8B, 32 layers"], targets="Linear"),
)
DEPTHS = tuple(depth(layers) for layers in (8, 16, 32, 64))
QUICK = (depth(2), Case("Llama 8B, 2 layers", "LlamaConfig", depth(2).settings, targets="Linear"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="two layers only; saves no result")
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="of each row, of which the best counts (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/tracing_time.json)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and save the result."""
    pin_threads(arguments.threads)
    warning = idle_warning()
    if warning:
        print(warning, file=sys.stderr)
    repeats = 1 if arguments.quick else arguments.repeats
    once(build(QUICK[0]), None)  # what torch and transformers import and set up at first
    rows = [measure(case, repeats) for case in (QUICK if arguments.quick else LARGE)]
    print(markdown(rows))
    depths = [] if arguments.quick else [measure(case, repeats) for case in DEPTHS]
    if depths:
        print("\nLayers of one class: what a layer returns is found out once\n\n" + markdown(depths))
    output: Path | None = arguments.output or (None if arguments.quick else FOLDER / "tracing_time.json")
    if output:
        save(output, {"environment": environment(arguments.threads), "rows": rows, "depths": depths})


def build(case: Case) -> nn.Module:
    """The model of `case` in bfloat16 on the meta device."""
    import torch
    import transformers

    config = getattr(transformers, case.config)(**case.settings)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def once(model: nn.Module, targets: str | None) -> tuple[float, float, Any]:
    """Seconds to trace and to partition `model`, without a cache, and the partition."""
    import torch

    from fxcalib import partition, trace

    ids = torch.ones(1, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    started = time.perf_counter()
    traced = trace(model, batch, targets)
    between = time.perf_counter()
    parts = partition(traced)
    return between - started, time.perf_counter() - between, parts


def measure(case: Case, repeats: int) -> dict[str, object]:
    """The row of `case`: the best of `repeats`."""
    model = build(case)
    found = [once(model, case.targets) for _ in range(repeats)]
    tracing, cutting, parts = min(found, key=lambda run: run[0] + run[1])
    return {
        "model": case.name,
        "targets": case.targets or "layers",
        "seconds": tracing + cutting,
        "tracing, s": tracing,
        "partitioning, s": cutting,
        "nodes": len(parts.traced.graph.nodes),
        "subgraphs": len(parts),
    }
