"""What committing takes beside the statistics: the temporaries of the solvers, in bytes and operations.

Each term is an array that the code in `fxcalib.math` and `fxcalib.modifiers.weights` holds at its worst moment.
Axes: O output channels, I input channels; w bytes of a weight's element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxcalib.modifiers import GPTQModifier, Modifier, SparseGPTModifier
from fxcalib.modifiers.scheme_modifier import SchemeModifier
from fxcalib.modifiers.sparsity_modifier import SparsityModifier

_FLOAT = 4
_CANDIDATES = 22
"""Clipping ranges that the search for scales of least error tries: 15, then 7 around the best."""
_SEARCH_PASSES = 6
"""Operations on all elements for each candidate: copy, divide, round, clamp, multiply, subtract."""


@dataclass(frozen=True)
class Committed:
    """What one commit takes."""

    working_bytes: int = 0
    """Most bytes of temporaries at once, beyond weights and statistics."""
    flops: int = 0
    traffic: int = 0
    """Bytes that elementwise operations read and write."""


def commit_of(
    modifier: Modifier,
    modules: Mapping[str, nn.Module],
    names: frozenset[str],
    shared: Sequence[Sequence[str]],
    *,
    on_cuda: bool = False,
) -> Committed:
    """What `modifier` takes to commit the modules `names`, of which those in one of `shared` read the same tensor.

    A modifier that fxcalib does not bring is taken for one that rounds to nearest.
    """
    chosen = {n: getattr(modules[n], "weight", None) for n in modules if n in names}
    weights = {n: w for n, w in chosen.items() if isinstance(w, torch.Tensor)}
    solves = isinstance(modifier, (GPTQModifier, SparseGPTModifier))
    solved = [[n for n in group if n in weights] for group in shared] if solves else []
    shifted = isinstance(modifier, GPTQModifier) and modifier.observes_originals
    together = [group for members in solved if members for group in _alike(modifier, members)]
    parts = [_gptq([weights[n] for n in group], on_cuda, shifted) for group in together]
    left = weights.keys() - {n for group in solved for n in group}
    alone = _pruned if isinstance(modifier, SparsityModifier) else _nearest
    parts += [alone(weights[n]) for n in weights if n in left]
    return Committed(
        max((p.working_bytes for p in parts), default=0), sum(p.flops for p in parts), sum(p.traffic for p in parts)
    )


def _alike(modifier: Modifier, names: Sequence[str]) -> list[list[str]]:
    """Modules that are solved as one stacked weight: those of equal weight arguments."""
    if not isinstance(modifier, SchemeModifier):
        return [list(names)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(modifier.scheme_of(name).weights), []).append(name)
    return list(groups.values())


def _gptq(weights: Sequence[torch.Tensor], on_cuda: bool, shifted: bool) -> Committed:
    width = weights[0].shape[1]
    size = sum(w.numel() for w in weights)
    out = size // width
    hessian = width * width * _FLOAT
    # factorize: the permuted Hessian; on CUDA its factor replaces it, elsewhere it lies beside it
    factorizing = (1 if on_cuda else 2) * hessian
    stacked = size * weights[0].element_size() if len(weights) > 1 else 0
    # solve: the weight, what it is quantized to, its errors, each as (I, O) float32
    solving = hessian + stacked + 3 * size * _FLOAT
    flops = width**3 // 3 + 2 * out * width * width * 2
    if shifted:
        # correct: the factor with its diagonal beside the one without; the weights' share of the shift and what is
        # solved from it. Their corrected values stay, in float32 and stacked once more.
        solving = max(2 * hessian + 3 * size * _FLOAT, hessian + 5 * size * _FLOAT)
        flops += 2 * out * width * width * 2
    search = _CANDIDATES * _SEARCH_PASSES * size * 2 * _FLOAT
    return Committed(max(factorizing, solving), flops, search)


def _nearest(weight: torch.Tensor) -> Committed:
    size = weight.numel()
    # the quantized weight in float32; then the original as float32 (where it is not) and its square
    arrays = 2 if weight.dtype == torch.float32 else 3
    return Committed(arrays * size * _FLOAT, 0, _CANDIDATES * _SEARCH_PASSES * size * 2 * _FLOAT)


def _pruned(weight: torch.Tensor) -> Committed:
    size = weight.numel()
    # the scores, sorted, their order in int64, and two masks; each of them is written and read once
    held = size * (2 * _FLOAT + 8 + 2)
    return Committed(held, 0, 2 * held)
