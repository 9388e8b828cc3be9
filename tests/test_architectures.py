"""The same machine for every kind of model: traced subgraphs against the model itself, and against its own forwards."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from batches import assert_identical
from eager import eager_in_step
from test_pipelines import gptq, same_state

from fxcalib import DatasetArguments, GPTQModifier, calibrate, partition, trace
from fxcalib.modifiers import Modifier
from fxcalib.pipelines import IndependentPipeline


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
    """What a loop by hand over the model's own forwards gives, the graph gives, and so do suspended forwards."""
    (traced, batches), (hung, _), (walked, _) = (ARCHITECTURES[kind]() for _ in range(3))
    # what lies between the targets is compressed by the graph, but out of reach of suspended forwards
    options = {"ignore": ["re:.*multi_modal_projector.*", "lm_head"]} if kind == "vision-language" else {}
    eager_in_step(walked, batches, gptq(**options))
    first = calibrate(traced, batches, gptq(**options), device="cpu")
    second = calibrate(hung, batches, gptq(**options), pipeline="layer_sequential", suspended=True, device="cpu")
    assert {m.name for m in first.modules} == {m.name for m in second.modules}
    same_state(traced, walked)
    same_state(hung, walked)


def test_independent_is_one_modifier_after_another_in_an_encoder_decoder() -> None:
    """Each modifier has its own walk over the model that the one before it has left."""

    def modifiers() -> list[Modifier]:
        inner, outer = [r"re:.*SelfAttention\.[qkvo]$"], [r"re:.*DenseReluDense\.w[io]$"]
        return [gptq(targets=inner, ignore=[]), GPTQModifier(scheme="W8A16", targets=outer, ignore=[], group_size=32)]

    (together, batches), (apart, _) = ARCHITECTURES["encoder-decoder"](), ARCHITECTURES["encoder-decoder"]()
    outcome = IndependentPipeline(modifiers())(together, batches, DatasetArguments(device="cpu"))
    for modifier in modifiers():
        eager_in_step(apart, batches, modifier)
    same_state(together, apart)
    assert len(outcome.plans) == 2
    assert {m.scheme.split()[0] for m in outcome.modules} == {"int4", "int8"}
