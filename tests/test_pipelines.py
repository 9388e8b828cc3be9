from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from batches import state_of, token_batch
from tiny_llama import tiny_llama
from torch import nn

from fxcalib import DatasetArguments, GPTQModifier, QuantizationModifier, calibrate, partition, trace
from fxcalib.caches import without_cache
from fxcalib.errors import BatchError, DataError, NonFiniteActivationError, OptionError, TargetError
from fxcalib.modifiers import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.base import CurrentBatch
from fxcalib.pipelines import (
    BasicPipeline,
    CalibrationPipeline,
    DataFreePipeline,
    IndependentPipeline,
    SequentialPipeline,
)
from fxcalib.progress import Progress
from fxcalib.tracing import TraceError

MIXED = [
    token_batch(2, 16, seed=1),
    token_batch(3, 9, seed=2, left=4),
    token_batch(1, 12, seed=3),
    token_batch(2, 16, seed=4, right=5),
]


def gptq(**options: Any) -> GPTQModifier:
    return GPTQModifier(scheme="W4A16", group_size=32, **options)


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def eager_sequential(model: Any, batches: Sequence[dict[str, torch.Tensor]], modifier: Modifier) -> None:
    """Layer by layer by hand: every layer is observed on all batches, committed, and run again."""
    inputs: list[tuple[Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append((args, kwargs))

    with torch.no_grad():
        modifier.attach(model)
        handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        for batch in batches:
            model(**batch, use_cache=False)
        handle.remove()
        for k, layer in enumerate(model.model.layers):
            modules = {n: m for n, m in model.named_modules() if n.startswith(f"model.layers.{k}")}
            current = CurrentBatch()
            scope = Scope(model, k, modules, current)
            with modifier.observe(scope):
                for i, ((args, kwargs), batch) in enumerate(zip(inputs, batches, strict=True)):
                    mask = batch["attention_mask"].bool()
                    current.index, current.token_mask = i, None if mask.all() else mask
                    layer(*args, **kwargs)
            modifier.commit(scope)
            inputs = [((layer(*args, **kwargs),), kwargs) for args, kwargs in inputs]
        modifier.detach(model)


@pytest.mark.parametrize(
    "modifier",
    [
        gptq,
        lambda: QuantizationModifier(scheme="FP8"),
        lambda: GPTQModifier(scheme="W8A8"),
    ],
)
def test_sequential_is_the_eager_walk_bit_for_bit(modifier: Any) -> None:
    walked, calibrated = tiny_llama(), tiny_llama()
    eager_sequential(walked, MIXED, modifier())
    report = calibrate(calibrated, MIXED, modifier(), device="cpu")
    same_state(walked, calibrated)
    assert report.passes == 3
    assert report.retraces == 1
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in MIXED)
    assert [s.targets for s in report.subgraphs] == [("model.layers.0",), ("model.layers.1",), ()]


@pytest.mark.parametrize("offload", ["cpu", "none"])
@pytest.mark.parametrize("per", [1, 2])
def test_offload_changes_nothing_and_subgraphs_may_be_larger(offload: str, per: int) -> None:
    model, other = tiny_llama(), tiny_llama()
    calibrate(model, MIXED, gptq(), offload=offload, targets_per_subgraph=per)
    calibrate(other, MIXED, gptq(), targets_per_subgraph=per)
    same_state(model, other)


def test_linear_targets_calibrate_each_projection_on_compressed_inputs() -> None:
    fine, coarse = tiny_llama(), tiny_llama()
    report = calibrate(fine, MIXED, gptq(), targets=["re:.*(q|k|v|o|gate|up|down)_proj$"])
    calibrate(coarse, MIXED, gptq())
    assert len(report.subgraphs) == 15
    assert not torch.equal(fine.model.layers[0].mlp.down_proj.weight, coarse.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(fine.model.layers[0].self_attn.q_proj.weight, coarse.model.layers[0].self_attn.q_proj.weight)


def test_weight_only_rounding_asks_for_no_data() -> None:
    class Refusing:
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            raise AssertionError("no batch may be taken")

    report = calibrate(tiny_llama(), Refusing(), QuantizationModifier(scheme="W4A16", group_size=32))
    assert report.passes == report.batches == 0
    assert len(report.modules) == 14


def test_names_are_found_in_any_spelling() -> None:
    assert CalibrationPipeline.named("Data-Free") is DataFreePipeline
    assert CalibrationPipeline.named("data_free") is DataFreePipeline
    assert CalibrationPipeline.named("SEQUENTIAL") is SequentialPipeline
    with pytest.raises(OptionError, match="unknown pipeline 'sequentail': did you mean 'sequential'"):
        CalibrationPipeline.named("sequentail")


def test_the_pipeline_is_inferred_from_the_modifiers() -> None:
    rounding = QuantizationModifier(scheme="W4A16")
    assert isinstance(CalibrationPipeline.from_modifiers([rounding]), DataFreePipeline)
    assert isinstance(CalibrationPipeline.from_modifiers([rounding, gptq()]), SequentialPipeline)
    with pytest.warns(UserWarning, match="basic pipeline calibrates every layer on the outputs of the original"):
        assert isinstance(CalibrationPipeline.from_modifiers([gptq()], "basic"), BasicPipeline)
    with pytest.raises(OptionError, match="datafree pipeline shows no data to the model, but GPTQModifier needs it"):
        CalibrationPipeline.from_modifiers([gptq()], "datafree")
    with pytest.raises(OptionError, match="at least one modifier"):
        CalibrationPipeline.from_modifiers([])


def test_a_pipeline_takes_one_modifier_or_several_and_refuses_what_is_no_name() -> None:
    pipeline = CalibrationPipeline.from_modifiers(gptq())
    assert isinstance(pipeline, SequentialPipeline)
    assert len(pipeline.modifiers) == 1
    with pytest.raises(OptionError, match="pipeline is 5; give one of basic, datafree, independent, layer_sequential"):
        CalibrationPipeline.from_modifiers([gptq()], 5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="datafree pipeline shows no data to the model, but GPTQModifier needs it"):
        DataFreePipeline([gptq()])


def test_a_variation_without_a_name_takes_nobodys_place() -> None:
    class Logged(SequentialPipeline):
        pass

    assert type(CalibrationPipeline.from_modifiers([gptq()])) is SequentialPipeline
    assert type(Logged([gptq()])) is Logged


@pytest.mark.parametrize("name", [field.name for field in fields(DatasetArguments)])
def test_none_is_the_default_of_every_option(name: str) -> None:
    assert DatasetArguments(**{name: None}) == DatasetArguments()


def test_one_target_needs_no_list() -> None:
    assert DatasetArguments(sequential_targets="LlamaDecoderLayer").sequential_targets == ("LlamaDecoderLayer",)  # type: ignore[arg-type]
    assert DatasetArguments(tracing_ignore=["a", "b"]).tracing_ignore == ("a", "b")  # type: ignore[arg-type]


def test_models_that_hand_keywords_on_are_told_to_keep_no_cache() -> None:
    model, batches = ARCHITECTURES["vision-language"]()
    assert without_cache(model, batches[0]) == {**batches[0], "use_cache": False}
    assert without_cache(model, {"use_cache": True}) == {"use_cache": True}
    assert "use_cache" in without_cache(tiny_llama(), MIXED[0])
    assert "use_cache" not in without_cache(nn.Linear(2, 2), {"input": torch.ones(1, 2)})


def test_basic_calibrates_on_the_original_model() -> None:
    model, first = tiny_llama(), tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BasicPipeline([gptq()])(model, MIXED)
    calibrate(first, MIXED, gptq(), targets_per_subgraph=2)
    same_state(model, first)


def test_independent_is_one_modifier_after_another() -> None:
    def modifiers() -> tuple[Modifier, Modifier]:
        return (
            gptq(targets=["re:.*self_attn.*_proj$"], ignore=[]),
            QuantizationModifier(scheme="W8A16", targets=["re:.*mlp.*_proj$"], group_size=64, ignore=[]),
        )

    together, apart = tiny_llama(), tiny_llama()
    outcome = IndependentPipeline(modifiers())(together, iter(MIXED))
    first, second = modifiers()
    SequentialPipeline([first])(apart, MIXED)
    DataFreePipeline([second])(apart, None)
    same_state(together, apart)
    assert len(outcome.plans) == 2
    assert len(outcome.modules) == 14


class Watching(Modifier):
    """Observes every Linear; looks for hooks whenever it runs."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.calls = 0

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(self._names, self._names)

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._names = frozenset(n for n, m in model.named_modules() if isinstance(m, nn.Linear))

    def hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._model.modules())

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        self.events.append(f"observe {scope.index}")
        assert self.hooks() == 0

        def count(module: nn.Module, args: Any) -> None:
            self.calls += 1
            assert scope.batch.index >= 0

        handles = [m.register_forward_pre_hook(count) for n, m in scope.modules.items() if n in self._names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def commit(self, scope: Scope) -> list[ModuleResult]:
        self.events.append(f"commit {scope.index}")
        assert self.hooks() == 0
        return []

    def detach(self, model: nn.Module) -> None:
        self.events.append("detach")


def test_each_module_is_observed_once_a_batch_and_hooks_live_only_while_observing() -> None:
    watching, model = Watching(), tiny_llama()
    calibrate(model, MIXED, watching)
    steps = [f"{kind} {k}" for k in range(3) for kind in ("observe", "commit")]
    assert watching.events == [*steps, "detach"]
    assert watching.calls == len(MIXED) * 15
    assert watching.hooks() == 0


def test_modifiers_are_detached_when_the_run_fails() -> None:
    watching, model = Watching(), tiny_llama()
    with pytest.raises(BatchError):
        calibrate(model, [*MIXED, {"input_ids": torch.full((1, 4), 10_000)}], watching)
    assert watching.events == ["detach"]
    failing = tiny_llama()
    with pytest.raises(BatchError):
        calibrate(failing, [*MIXED, {"input_ids": torch.full((1, 4), 10_000)}], gptq())
    same_state(failing, tiny_llama())


def test_the_mode_of_the_model_returns() -> None:
    model = tiny_llama().train()
    calibrate(model, MIXED, gptq())
    assert model.training
    assert model.model.layers[0].training


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="these modifiers need calibration data"):
        calibrate(tiny_llama(), None, gptq())
    with pytest.raises(DataError, match="the dataloader yields no batch"):
        calibrate(tiny_llama(), [], gptq())


def test_unknown_targets_devices_and_offloads_are_refused() -> None:
    with pytest.raises(TargetError, match="sequential target 'Decoder' matches no module"):
        calibrate(tiny_llama(), MIXED, gptq(), targets="Decoder")
    with pytest.raises(OptionError, match="device 'cuda:99' cannot be used here"):
        calibrate(tiny_llama(), MIXED, gptq(), device="cuda:99")
    with pytest.raises(OptionError, match="offload 'disc' is neither 'auto', 'cpu', 'none' nor a device"):
        calibrate(tiny_llama(), MIXED, gptq(), offload="disc")
    assert DatasetArguments(device="cpu").compute_device() == torch.device("cpu")


def test_an_activation_that_is_not_finite_is_named_with_its_batch() -> None:
    class Poisoned(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.where(ids[..., None] == 77, torch.inf, super().forward(ids))

    model = tiny_llama()
    model.model.embed_tokens.__class__ = Poisoned  # infinite for a token that only the third batch holds
    batches = [{**b, "input_ids": b["input_ids"].clone()} for b in MIXED]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 77] = 78
    batches[2]["input_ids"][0, 5] = 77
    with pytest.raises(NonFiniteActivationError, match=r"batch 2") as caught:
        calibrate(model, batches, gptq())
    assert "input of module 'model.layers.0.self_attn." in str(caught.value)
    with pytest.raises(NonFiniteActivationError, match=r"batch 2") as caught:
        calibrate(model, batches, Watching())
    assert "model.embed_tokens (Poisoned) returns NaN or infinity" in str(caught.value)


def test_messages_list_the_keys_of_a_batch_as_it_was_given() -> None:
    with pytest.raises(BatchError, match=r"its keys are 'attention_mask': rename or add one"):
        calibrate(tiny_llama(), [{"attention_mask": MIXED[0]["attention_mask"]}], gptq())


def test_each_subgraph_is_told_to_be_done_once_and_in_order() -> None:
    class Told(Progress):
        def __init__(self) -> None:
            self.events: list[object] = []

        def module(self, result: ModuleResult) -> None:
            self.events.append(result.name)

        def subgraph(self, subgraph: int, seconds: float) -> None:
            assert seconds > 0
            self.events.append(subgraph)

    told = Told()
    report = calibrate(tiny_llama(), MIXED, gptq(), progress=told)
    run = [subgraph.index for subgraph in report.subgraphs if subgraph.calibrate_seconds]  # nothing is run of the head
    assert [event for event in told.events if isinstance(event, int)] == run == [0, 1]
    assert told.events.index(0) < told.events.index("model.layers.1.mlp.down_proj") < told.events.index(1)


def test_padding_may_hold_anything() -> None:
    """Rows of padding attend to nothing; what comes out there is neither an error nor part of the statistics."""
    model, other = tiny_llama(), tiny_llama()
    noisy = copy.deepcopy(MIXED)
    for batch in noisy:
        batch["input_ids"][batch["attention_mask"] == 0] = 5
    calibrate(model, noisy, gptq())
    changed = copy.deepcopy(noisy)
    for batch in changed:
        batch["input_ids"][batch["attention_mask"] == 0] = 9
    calibrate(other, changed, gptq())
    same_state(model, other)


def test_a_batch_that_takes_another_way_through_the_targets_is_refused() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

        def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
            for layer in self.layers[1 if skip else 0 :]:
                x = layer(x)
            return x

    x = torch.randn(4, 32)
    model, batches = Skipping(), [{"x": x, "skip": False}, {"x": x, "skip": True}]
    with pytest.raises(TraceError, match="another way through the sequential targets"):
        calibrate(model, batches, gptq(), targets=["Linear"])
    parts = partition(trace(model, batches[0], ["Linear"]))
    with torch.no_grad():
        assert all(torch.equal(parts.run(batch), model(**batch)) for batch in batches)
