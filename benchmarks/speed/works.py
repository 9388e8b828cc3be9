"""What is calibrated: a model, an algorithm with its scheme, and how much data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Algorithm = Literal["gptq", "static", "rtn"]


@dataclass(frozen=True)
class Work:
    """One calibration that every tool does alike."""

    algorithm: Algorithm
    """`gptq`, `static` scales of activations, or `rtn`: weights alone, rounded to nearest."""
    scheme: dict[str, Any]
    """Arguments of a compressed-tensors `QuantizationScheme` but its targets, which are all Linears except the head."""
    samples: int
    seq_len: int
    """Tokens of each sample; none is padded."""
    sizes: dict[str, Any] | None = None
    """`LlamaConfig` of a model with random weights, calibrated on random tokens; None: SmolLM2-135M on news."""

    @property
    def pipeline(self) -> str | None:
        """The pipeline to ask for; None where the tool's own default is what it should run.

        Weights alone need no data; asking for the sequential pipeline shows what a tool makes of that.
        """
        return "sequential" if self.algorithm == "rtn" else None

    @property
    def group_size(self) -> int | None:
        """Columns of a weight that share a scale; None where a whole row or tensor does."""
        size: int | None = self.scheme["weights"].get("group_size")
        return size

    def tiny(self) -> Work:
        """The same on a model and data so small that it takes no time."""
        return replace(self, samples=max(4, self.samples // 64), seq_len=32, sizes=TINY)


LLAMA_8B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
}
"""Four layers of Llama-3-8B's shape. The vocabulary is a quarter of the original: neither embedding nor head is
calibrated, and making their weights would only delay the start."""

TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_STATIC = {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}


def _w4a16(group_size: int) -> dict[str, Any]:
    return {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}}


STATIC_INT8 = {"weights": {**_INT8, "strategy": "channel"}, "input_activations": {**_INT8, **_STATIC}}
"""W8A8 with one static scale for all of an activation; the preset W8A8 has dynamic ones, which need no data."""
STATIC_FP8 = {"weights": {**_FP8, "strategy": "tensor"}, "input_activations": {**_FP8, **_STATIC}}
"""The preset FP8."""

WORKS: dict[str, dict[str, Work]] = {
    "cuda": {
        "gptq": Work("gptq", _w4a16(128), 128, 2048, LLAMA_8B),
        "fp8": Work("static", STATIC_FP8, 128, 2048, LLAMA_8B),
        "int8": Work("static", STATIC_INT8, 128, 2048, LLAMA_8B),
        "gptq512": Work("gptq", _w4a16(128), 512, 2048, LLAMA_8B),
    },
    "cpu": {
        "gptq": Work("gptq", _w4a16(64), 64, 512),
        "w8a8": Work("static", STATIC_INT8, 64, 512),
        "rtn": Work("rtn", _w4a16(64), 64, 512),
    },
}
"""Device -> name -> work."""


def chosen(device: str, names: list[str] | None, *, quick: bool) -> dict[str, Work]:
    """The works called `names`, all of them by default; `quick` makes them tiny, and then any runs on any device.

    Raises ValueError where a work is not one for `device`.
    """
    works = {**WORKS["cuda"], **WORKS["cpu"], **WORKS[device]} if quick else WORKS[device]
    for name in names or ():
        if name not in works:
            raise ValueError(f"no work {name!r} for {device}; choose from {', '.join(works)}")
    return {name: work.tiny() if quick else work for name, work in works.items() if names is None or name in names}
