"""The score of the zoo notices what it is there to notice: outputs are sabotaged, and it must say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcalib
from benchmarks.zoo.architectures import Architecture
from benchmarks.zoo.building import EAGER, Case, build, reference
from benchmarks.zoo.outputs import copied, difference, same_bits, structure, tensors
from benchmarks.zoo.scoring import DEFAULT, Score, score_cut
from benchmarks.zoo.targets import TargetSets
from benchmarks.zoo.tools import Cut, FxcalibCut, Suspended
from fxcalib import Partition, TracedModel

LLAMA = Architecture("causal_lm", "llama", "LlamaForCausalLM")

Sabotage = Callable[[TracedModel], None]


class Writing(nn.Module):
    """Reads what it then writes in place, between two targets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state = self.layers[0](x)
        before = state.abs()
        state.mul_(2)
        result: Tensor = self.layers[1](state) + before
        return result


@pytest.fixture
def llama() -> Case:
    return build(LLAMA)


@pytest.fixture
def writing() -> Case:
    torch.manual_seed(0)
    model, batches = Writing().eval(), ({"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)})
    references = tuple(reference(model, batch) for batch in batches)
    return Case(LLAMA, model, batches, references, TargetSets(("Linear",), ("Linear",)), 40, True, True)


def scored(case: Case, cut: Cut) -> Score:
    return score_cut(case, cut, case.targets.default, Score(DEFAULT, EAGER))


def traced(case: Case, sabotage: Sabotage | None = None) -> FxcalibCut:
    """The partition of the case's model, with the graph changed beforehand."""
    made = fxcalib.trace(case.model, case.batches[0], case.targets.default)
    if sabotage:
        sabotage(made)
    return FxcalibCut(fxcalib.partition(made))


def calls(made: TracedModel) -> list[fx.Node]:
    return [n for n in made.graph.nodes if n.op == "call_module" and n.target in made.targets.names]


class Tampered(Cut):
    """A cut whose batches or results are tampered with."""

    def __init__(self, cut: Cut, batch: Callable[[dict[str, Any]], Any] | None = None, result: Any = None) -> None:
        self._cut, self._batch, self._result = cut, batch, result

    @property
    def calls(self) -> list[list[int]]:
        return self._cut.calls

    def run(self, batch: Mapping[str, Any]) -> Any:
        changed = self._batch(dict(batch)) if self._batch else batch
        result = self._cut.run(changed)
        return self._result(result) if self._result else result


def test_without_sabotage_all_is_full(llama: Case, writing: Case) -> None:
    for case in (llama, writing):
        made = scored(case, traced(case))
        assert made.full and not made.wrong and made.cause is None


def test_a_mask_that_is_dropped_from_the_graph(llama: Case) -> None:
    def drop(made: TracedModel) -> None:
        for node in calls(made):
            assert node.kwargs["attention_mask"] is not None
            node.kwargs = {**node.kwargs, "attention_mask": None}

    made = scored(llama, traced(llama, drop))
    assert made.traced and made.alone and not made.exact and made.wrong and not made.full
    assert made.cause is not None and "logits differs by" in made.cause


def test_a_mask_that_is_dropped_in_one_layer_alone(llama: Case) -> None:
    def drop(made: TracedModel) -> None:
        node = calls(made)[-1]
        node.kwargs = {**node.kwargs, "attention_mask": None}

    made = scored(llama, traced(llama, drop))
    assert not made.exact and made.wrong


def test_a_mask_that_is_dropped_from_the_batch(llama: Case) -> None:
    unpadded = Tampered(traced(llama), lambda batch: {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    made = scored(llama, unpadded)
    assert not made.exact and not made.others and made.wrong


def test_a_stale_value(llama: Case) -> None:
    def reread(made: TracedModel) -> None:
        first, second = calls(made)[:2]
        second.replace_input_with(first, next(n for n in first.all_input_nodes if n.op == "call_module"))

    made = scored(llama, traced(llama, reread))
    assert made.alone and not made.exact and made.wrong


def test_a_value_of_another_batch(llama: Case) -> None:
    cut, kept = traced(llama), dict[tuple[int, ...], Any]()
    first = copied(llama.batches[0])

    def stale(batch: dict[str, Any]) -> dict[str, Any]:
        kept.setdefault((), batch)
        return first

    made = scored(llama, Tampered(cut, stale))
    assert made.exact and not made.others and made.wrong and not made.full


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_a_nudge_of_one_weight(llama: Case, name: str) -> None:
    cut = traced(llama)
    with torch.no_grad():
        llama.model.get_parameter(f"{name}.weight")[0, 0] += 1e-3
    made = scored(llama, cut)
    assert made.traced and made.alone and made.same_type and not made.exact and not made.others and made.wrong


def test_a_swapped_mutation_order(writing: Case) -> None:
    def swap(made: TracedModel) -> None:
        write = next(n for n in made.graph.nodes if "mul_" in str(n.target))
        read = next(n for n in made.graph.nodes if "abs" in str(n.target))
        assert list(made.graph.nodes).index(read) < list(made.graph.nodes).index(write)
        read.prepend(write)

    made = scored(writing, traced(writing, swap))
    assert made.traced and made.alone and not made.exact and made.wrong


def test_two_targets_in_one_subgraph(llama: Case) -> None:
    made = fxcalib.trace(llama.model, llama.batches[0], llama.targets.default)
    found = scored(llama, FxcalibCut(fxcalib.partition(made, targets_per_subgraph=2)))
    assert found.exact and not found.alone and not found.full
    assert found.cause == "one subgraph calls model.layers.0, model.layers.1"


def test_a_target_that_is_missing(llama: Case) -> None:
    one = fxcalib.trace(llama.model, llama.batches[0], ["model.layers.1"])
    found = scored(llama, FxcalibCut(fxcalib.partition(one)))
    assert found.exact and not found.alone
    assert found.cause == "model.layers.0 is called 1 times by the model and 0 times by the subgraphs"


def test_an_output_of_another_type(llama: Case) -> None:
    made = scored(llama, Tampered(traced(llama), result=lambda result: dict(result)))
    assert made.exact and made.others and not made.same_type and not made.full and not made.wrong
    assert made.cause == "batch 0: the output is dict instead of CausalLMOutputWithPast"


def test_a_batch_that_fails_is_not_silently_wrong(llama: Case) -> None:
    class Failing(Tampered):
        def run(self, batch: Mapping[str, Any]) -> Any:
            raise ValueError("no")

    made = scored(llama, Failing(traced(llama)))
    assert made.traced and not made.exact and not made.wrong
    assert made.cause is not None and made.cause.startswith("batch 0: ValueError: no")


def test_suspended_forwards_are_scored_alike(llama: Case) -> None:
    cut = Suspended().cut(llama.model, llama.batches[0], llama.targets.default)
    assert scored(llama, cut).full
    with torch.no_grad():
        llama.model.get_parameter("model.layers.0.self_attn.o_proj.weight")[0, 0] += 1e-3
    assert scored(llama, cut).wrong


def test_bits_are_compared_as_bits() -> None:
    a = torch.tensor([0.0, 1.0, float("nan")])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([-0.0, 1.0, float("nan")]))
    assert not same_bits(a, torch.tensor([0.0, 1.0, 2.0]))
    assert not same_bits(a, a.double()) and not same_bits(a, a[:2]) and not same_bits(a, a.to("meta"))
    assert same_bits(torch.tensor([1j]), torch.tensor([1j]))
    assert not same_bits(torch.tensor([True]), torch.tensor([False]))
    nudged = torch.nextafter(a[1:2], torch.tensor([2.0]))
    assert not same_bits(a[1:2], nudged)


def test_everything_in_an_output_is_compared() -> None:
    one = {"logits": torch.ones(2), "states": (torch.zeros(2), [torch.zeros(1), None])}
    assert list(tensors(one)) == ["logits", "states.0", "states.1.0"]
    assert structure(one)["states.1"] == "list"
    other = {**one, "states": (torch.zeros(2), [torch.ones(1), None])}
    assert difference(tensors(one), tensors(other)) == "states.1.0 differs by up to 1"
    less = {**one, "states": (torch.zeros(2),)}
    assert difference(tensors(one), tensors(less)) == "outputs differ: without ['states.1.0'], with []"


def test_the_caches_of_a_model_are_compared() -> None:
    from transformers import DynamicCache

    caches = [DynamicCache() for _ in range(2)]
    for index, cache in enumerate(caches):
        cache.update(torch.full((1, 1, 2, 4), float(index)), torch.zeros(1, 1, 2, 4), 0)
    held = [tensors({"past_key_values": cache}) for cache in caches]
    assert any("keys" in key for key in held[0])
    assert difference(held[0], held[0]) is None
    found = difference(held[0], held[1])
    assert found is not None and "differs by up to 1" in found


def test_a_nondeterministic_case_is_told_apart(llama: Case) -> None:
    assert llama.deterministic and llama.sensitive and len(llama.batches) == 3
    assert replace(llama, deterministic=False).deterministic is False
    assert isinstance(traced(llama).partition, Partition)
