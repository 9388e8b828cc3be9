"""The floor: what no tool can leave out, at the rates that this machine reaches on tensors that lie ready.

- `forwards`: two of every decoder layer over all batches, with sdpa and neither mask nor gradient;
- `statistics`: of each distinct input of Linears (one for q, k and v, one for gate and up) its Hessian for GPTQ, its
  least and largest value for static scales of activations;
- GPTQ besides: `factorisation` of each distinct Hessian, and `updates` of the later columns;
- `rounding` alone where only weights are quantized.

All layers and samples are run, not extrapolated. How many samples go into one forward and into one product is what is
fastest of `SAMPLES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.clock import fastest, seconds
from benchmarks.speed.floor_inputs import Distinct, Shapes
from benchmarks.speed.floor_weights import Solves, round_to_nearest
from benchmarks.speed.works import Work

SAMPLES = (1, 2, 4, 8, 16)

Part = Callable[[], object]


@torch.no_grad()
def floor(model: Any, tokens: Tensor, work: Work, device: torch.device, repeats: int) -> dict[str, Any]:
    """`parts`, seconds of each, the best of `repeats`; `seconds` is their sum; `samples_at_once` that were fastest."""
    shapes = Shapes(model, tokens, device)
    sizes = [size for size in SAMPLES if len(tokens) % size == 0]
    at_once: dict[str, int] = {}
    parts: dict[str, Part] = {}
    if work.algorithm == "rtn":
        weights = shapes.weights()
        parts["rounding"] = lambda: [round_to_nearest(weight, work.group_size) for weight in weights]
        parts["rounding"]()
    else:
        at_once["forwards"] = fastest(sizes, shapes.forward_once, device)
        parts["forwards"] = lambda: shapes.forwards(at_once["forwards"], passes=2)
        distinct = shapes.distinct(max(sizes))
        make = hessian if work.algorithm == "gptq" else extremes
        statistics = [make(each, shapes.seq_len, device) for each in distinct]
        at_once["statistics"] = fastest(sizes, lambda size: [add(size) for add in statistics], device)
        rounds = len(shapes.layers) * len(tokens) // at_once["statistics"]
        parts["statistics"] = lambda: [add(at_once["statistics"]) for _ in range(rounds) for add in statistics]
    if work.algorithm == "gptq":
        solves = Solves(distinct, len(shapes.layers), device)
        parts |= {"factorisation": solves.factorise, "updates": solves.update}
    measured = [{name: seconds(part, device) for name, part in parts.items()} for _ in range(repeats)]
    best = {name: min(repeat[name] for repeat in measured) for name in parts}
    return {"seconds": sum(best.values()), "parts": best, "samples_at_once": at_once}


def hessian(distinct: Distinct, seq_len: int, device: torch.device) -> Callable[[int], Tensor]:
    """Adds X^T X of so many samples to a float32 sum; bfloat16 products where an accelerator sums them in float32."""
    rows = distinct.rows if device.type == "cuda" else distinct.rows.float()
    total = torch.zeros(rows.shape[1], rows.shape[1], device=device)

    def add(samples: int) -> Tensor:
        x = rows[: samples * seq_len]
        if device.type == "cuda":
            return total.add_(torch.mm(x.t(), x, out_dtype=torch.float32))
        return total.addmm_(x.t(), x)

    return add


def extremes(distinct: Distinct, seq_len: int, device: torch.device) -> Callable[[int], object]:
    """Least and largest value of so many samples."""
    return lambda samples: torch.aminmax(distinct.rows[: samples * seq_len])
