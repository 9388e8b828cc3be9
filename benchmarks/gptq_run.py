"""One GPTQ run by one tool in this process, for `benchmarks.gptq`: MODEL DATA BATCH_SIZE [OBSERVER] -> a JSON line."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

GROUP_SIZE = 64


def scheme(observer: str | None) -> dict[str, QuantizationScheme]:
    """W4A16 symmetric in groups of 64, as config groups; `observer` None leaves the tool its default."""
    chosen = {} if observer is None else {"observer": observer}
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE, **chosen
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def fxcalib(model: nn.Module, folder: Path, windows: torch.Tensor, batch_size: int, observer: str | None) -> None:
    """GPTQ by fxcalib; `windows` is (window, sequence) int64."""
    from fxcalib import calibrate
    from fxcalib.modifiers import GPTQModifier

    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(windows, batch_size)
    ]
    calibrate(model, batches, [GPTQModifier(config_groups=scheme(observer), ignore=["lm_head"])])


def llmcompressor(model: nn.Module, folder: Path, windows: torch.Tensor, batch_size: int, observer: str | None) -> None:
    """GPTQ by llm-compressor on the same batches; it wants the tokenizer too."""
    from transformers import AutoTokenizer

    oneshot = importlib.import_module("llmcompressor").oneshot  # not a dependency, so type checking must do without
    modifier = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
    samples: Any = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=DataLoader(samples, batch_size=batch_size),
        recipe=modifier(config_groups=scheme(observer), ignore=["lm_head"]),
        pipeline="sequential",
    )


TOOLS = {"fxcalib": fxcalib, "llmcompressor": llmcompressor}


def peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def main(tool: str, folder: Path, data: Path, batch_size: int, observer: str | None) -> dict[str, object]:
    """Load the model, quantize it, then evaluate it: seconds of the quantization, bytes, perplexities, KL in nats."""
    from transformers import AutoModelForCausalLM

    from fxcalib.evaluation import evaluate

    windows = load_file(data)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    # A real pass over the weights, that mapped files count as loaded for both tools alike.
    with torch.inference_mode():
        model(input_ids=windows["calibration"][:1], use_cache=False)
    before = peak_bytes()
    started = time.perf_counter()
    TOOLS[tool](model, folder, windows["calibration"], batch_size, observer)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    result = evaluate(model, folder, windows["heldout"])
    return {
        "seconds": seconds,
        "before_bytes": before,
        "peak_bytes": peak,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "kl": result.kl,
    }


if __name__ == "__main__":
    tool, folder, data, batch_size, *observer = sys.argv[1:]
    print(json.dumps(main(tool, Path(folder), Path(data), int(batch_size), observer[0] if observer else None)))
