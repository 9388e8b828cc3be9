"""The eager reference: a loop over the model's own forwards, without a graph, a plan or the executor."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxcalib.caches import without_cache
from fxcalib.modifiers import Modifier, Scope
from fxcalib.modifiers.base import CurrentBatch
from fxcalib.suspended import SuspendedForward
from fxcalib.tracing import resolve_targets


def eager_in_step(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    modifier: Modifier,
    targets: str | Sequence[str] | None = None,
) -> None:
    """At each target: observe it on every batch, commit, and only then let every batch through it."""
    names = {id(model.get_submodule(name)): name for name in resolve_targets(model, targets).names}
    current, done = CurrentBatch(), set[str]()
    modifier.attach(model)
    with torch.no_grad():
        forwards = [SuspendedForward(model, names, copy.deepcopy(dict(without_cache(model, b)))) for b in batches]
        for forward in forwards:
            forward.advance()
        step = 0
        while (name := forwards[0].waits_at) is not None:
            assert {forward.waits_at for forward in forwards} == {name}
            inside = {n: m for n, m in model.named_modules() if n == name or n.startswith(f"{name}.")}
            scope = Scope(model, step, {n: m for n, m in inside.items() if n not in done}, current)
            if scope.modules:  # a target that is called again was compressed with its first call
                with modifier.observe(scope):
                    for index, (forward, batch) in enumerate(zip(forwards, batches, strict=True)):
                        mask = batch.get("attention_mask")
                        padded = mask is not None and not bool(mask.bool().all())
                        current.index, current.token_mask = index, mask.bool() if padded else None
                        forward.rehearse()
                modifier.commit(scope)
            done |= set(inside)
            for forward in forwards:
                forward.advance()
            step += 1
    modifier.detach(model)
