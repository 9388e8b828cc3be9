"""The same machine for every kind of model: traced subgraphs against the model itself, and against its own forwards."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from batches import assert_identical
from test_pipelines import gptq, same_state

from fxcalib import calibrate, partition, trace


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_subgraphs_run_as_the_model(kind: str) -> None:
    model, batches = ARCHITECTURES[kind]()
    parts = partition(trace(model, batches[0]))
    assert sum(len(subgraph.targets) for subgraph in parts) >= 2
    assert all(len(subgraph.targets) <= 1 for subgraph in parts)
    with torch.no_grad():
        for batch in batches:
            assert_identical(parts.run(batch), model(**batch))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sequential_equals_the_eager_walk(kind: str) -> None:
    """Suspended forwards are the model's own, layer by layer in step: what a walk by hand would do."""
    (traced, batches), (walked, _) = ARCHITECTURES[kind](), ARCHITECTURES[kind]()
    # what lies between the targets is compressed by the graph, but out of reach of suspended forwards
    options = {"ignore": ["re:.*multi_modal_projector.*", "lm_head"]} if kind == "vision-language" else {}
    first = calibrate(traced, batches, gptq(**options))
    second = calibrate(walked, batches, gptq(**options), pipeline="layer_sequential", suspended=True)
    assert {m.name for m in first.modules} == {m.name for m in second.modules}
    same_state(traced, walked)
