"""One measured quantization in this process, for `benchmarks.peaks`: a JSON job as argument, a JSON line as result."""

from __future__ import annotations

import gc
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxcalib import memory, quantize
from fxcalib.loading import load
from fxcalib.modifiers import GPTQModifier, Modifier, QuantizationModifier
from fxcalib.progress import Progress

WARM_UP: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
MODIFIERS: dict[str, Callable[[], Modifier]] = {
    "gptq": lambda: GPTQModifier(scheme="W4A16"),
    "static-w8a8": lambda: QuantizationModifier(
        scheme={"weights": {**_INT8, "strategy": "channel"}, "input_activations": {**_INT8, "strategy": "tensor"}}
    ),
}
"""What is measured: GPTQ W4A16 in groups of 128, and int8 weights and activations with static scales."""


class PhasePeaks(Progress):
    """Remembers the peaks, in bytes, of each phase of a job."""

    def __init__(self) -> None:
        self.host: dict[str, int] = {}
        self.device: dict[str, int] = {}
        self._current: str | None = None

    def phase(self, name: str) -> None:
        self.close()
        self._current = name

    def close(self) -> None:
        """Take the peaks of the phase that ends, and measure anew."""
        if self._current is not None and self._current not in self.host:
            self.host[self._current] = memory.peak_host_bytes()
            self.device[self._current] = memory.peak_device_bytes()
        memory.reset_peaks()


def measure(job: dict[str, Any]) -> dict[str, object]:
    """Quantize `job["model"]` on random tokens; the peaks of each phase beyond what the idle process holds, bytes.

    A small model goes first through the same work, so that libraries that are loaded on first use count as idle.
    """
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        save_random(WARM_UP, small)
        warm = {**job, "model": str(small), "batches": 2, "vocabulary": WARM_UP["vocab_size"]}
        _quantize(warm, Path(scratch) / "warm", Progress())
        gc.collect()
        idle = _resident_bytes()
        peaks = PhasePeaks()
        # loaded apart from the rest: a calibration measures its own peak, and forgets the one before it
        peaks.phase("load")
        loaded = load(job["model"])
        peaks.close()
        report = _quantize({**job, "model": loaded.model}, Path(scratch) / "saved", peaks)
    return {
        "idle_bytes": idle,
        "host": {phase: peak - idle for phase, peak in peaks.host.items()},
        "device": peaks.device,
        "seconds": report.seconds,
    }


def save_random(sizes: dict[str, Any], folder: Path) -> None:
    """Save a random bfloat16 Llama of these sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=False, dtype="bfloat16", max_position_embeddings=4096)
    model: Any = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)


def _quantize(job: dict[str, Any], output: Path, progress: Progress) -> Any:
    generator = torch.Generator().manual_seed(0)
    shape = (job["batch_size"], job["seq_len"])
    tokens = (torch.randint(job["vocabulary"], shape, generator=generator) for _ in range(job["batches"]))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    return quantize(
        job["model"],
        modifiers=MODIFIERS[job["modifier"]](),
        data=data,
        device=job["device"],
        output=output,
        progress=progress,
    )


def _resident_bytes() -> int:
    """Resident set of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
