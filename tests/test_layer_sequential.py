from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from batches import token_batch
from eager import eager_in_step
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipelines import MIXED, gptq, same_state
from tiny_llama import tiny_llama
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fxcalib import QuantizationModifier, calibrate
from fxcalib.errors import ModelError, OptionError
from fxcalib.pipelines import get_targets_from_modifiers
from fxcalib.tracing import TraceError


@pytest.mark.parametrize("suspended", [False, True])
@pytest.mark.parametrize("modifier", [gptq, lambda: QuantizationModifier(scheme="FP8")])
@pytest.mark.parametrize("propagate_error", [True, False])
def test_it_equals_sequential_bit_for_bit(suspended: bool, modifier: Any, propagate_error: bool) -> None:
    chained, traced = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    first = calibrate(
        chained,
        MIXED,
        modifier(),
        pipeline="layer_sequential",
        suspended=suspended,
        propagate_error=propagate_error,
        device="cpu",
    )
    second = calibrate(traced, MIXED, modifier(), propagate_error=propagate_error, device="cpu")
    same_state(chained, traced)
    assert first.passes == second.passes == (5 if propagate_error else 3)
    assert [s.targets for s in first.subgraphs] == [(f"model.layers.{k}",) for k in range(3)]


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def pairs() -> list[dict[str, torch.Tensor]]:
    return [
        {**token_batch(2, 8, seed=s), "decoder_input_ids": token_batch(2, 5, seed=9 + s)["input_ids"]} for s in (1, 2)
    ]


def test_an_encoder_decoder_is_refused_unless_suspended() -> None:
    with pytest.raises(ModelError, match=r"cannot run T5ForConditionalGeneration: .* Use pipeline='sequential'"):
        calibrate(t5(), pairs(), gptq(), pipeline="layer_sequential")
    hung, traced = t5(), t5()
    calibrate(hung, pairs(), gptq(), pipeline="layer_sequential", suspended=True)
    calibrate(traced, pairs(), gptq())
    same_state(hung, traced)


class Branching(nn.Module):
    """A chain of layers behind a branch on a module's result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(32, 32)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if x.sum() > 0:
            x = -x
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_calibrated_without_a_trace() -> None:
    batches = [{"x": torch.randn(6, 32)} for _ in range(3)]
    options: dict[str, Any] = {"targets": ["re:layers.\\d+$"], "pipeline": "layer_sequential"}
    chained, hung = Branching(), Branching()
    modifier = {"ignore": ["embed"], "targets": ["Linear"]}
    report = calibrate(chained, batches, gptq(**modifier), **options)
    calibrate(hung, batches, gptq(**modifier), suspended=True, **options)
    same_state(chained, hung)
    assert [m.measure for m in report.modules] == ["output", "output"]


class Untraceable(Branching):
    """Leaves torch half-way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.from_numpy(x.numpy().copy()) + torch.from_numpy(self.embed(x).numpy()))


def test_what_cannot_be_traced_falls_back_where_no_pipeline_was_asked_for() -> None:
    model, expected, batches = Untraceable(), Untraceable(), [{"x": torch.randn(4, 32)} for _ in range(3)]
    with pytest.raises(TraceError, match="numpy"):
        calibrate(model, batches, gptq(ignore=["embed"]), pipeline="sequential")
    with pytest.warns(UserWarning, match="cannot be traced, so its own forwards are suspended"):
        report = calibrate(model, batches, gptq(ignore=["embed"]), pipeline=None)
    assert any("suspended" in warning for warning in report.warnings)
    calibrate(expected, batches, gptq(ignore=["embed"]), pipeline="layer_sequential", suspended=True)
    same_state(model, expected)


def test_glue_between_layers_is_noticed() -> None:
    class Scaled(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) * 2
            return x

    with pytest.raises(ModelError, match=r"the output of layers\.0 is not the input of layers\.1"):
        calibrate(
            Scaled(),
            [{"x": torch.randn(2, 32)}],
            gptq(ignore=["embed"]),
            targets=["re:layers.\\d+$"],
            pipeline="layer_sequential",
        )


def test_targets_come_from_the_modifiers() -> None:
    model = tiny_llama()
    assert get_targets_from_modifiers([gptq()], model) == (["LlamaDecoderLayer"], [])
    asking = gptq(sequential_targets=["LlamaAttention"])
    also = QuantizationModifier(scheme="FP8", sequential_targets="LlamaMLP")
    assert get_targets_from_modifiers([asking, also, gptq()], model) == (["LlamaAttention", "LlamaMLP"], [])
    with pytest.raises(OptionError, match="lies inside of a target that another modifier asks for"):
        get_targets_from_modifiers([asking, gptq(sequential_targets=["LlamaDecoderLayer"])], model)
    report = calibrate(model, MIXED, gptq(sequential_targets=["LlamaAttention", "LlamaMLP"]))
    assert len(report.subgraphs) == 5


def vision_transformer() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config)


def sliding_window() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=8,
    )
    return Gemma3ForCausalLM(config)


def parallel_attention() -> PhiForCausalLM:
    config = PhiConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return PhiForCausalLM(config)


def learned_positions() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    return OPTForCausalLM(config)


CHAINS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "vision transformer": (vision_transformer, {"ignore": ["classifier"], "sequential_targets": ["ViTLayer"]}),
    "sliding window": (sliding_window, {}),
    "parallel attention": (parallel_attention, {}),
    "learned positions": (learned_positions, {}),
    "decoder behind images": (
        lambda: ARCHITECTURES["vision-language"]()[0],
        {"targets": [r"re:.*language_model.*proj$"], "ignore": [], "sequential_targets": ["LlamaDecoderLayer"]},
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_it_equals_sequential_and_the_eager_walk_in_many_models(kind: str) -> None:
    make, options = CHAINS[kind]
    batches: list[dict[str, Any]] = [token_batch(2, 16, seed=1), token_batch(3, 9, seed=2, left=4)]
    if kind == "vision transformer":
        batches = [{"pixel_values": torch.randn(rows, 3, 32, 32)} for rows in (2, 3)]
    elif kind == "decoder behind images":
        batches = ARCHITECTURES["vision-language"]()[1]
    torch.manual_seed(0)
    chained = make().eval().requires_grad_(False)
    traced, walked = copy.deepcopy(chained), copy.deepcopy(chained)
    first = calibrate(chained, batches, gptq(**options), pipeline="layer_sequential", device="cpu")
    calibrate(traced, batches, gptq(**options), device="cpu")
    eager_in_step(walked, batches, gptq(**options), options.get("sequential_targets"))
    assert first.modules
    same_state(chained, traced)
    same_state(chained, walked)


def test_a_key_value_cache_is_not_filled_twice() -> None:
    batches = [{**batch, "use_cache": True} for batch in MIXED]
    chained, walked = tiny_llama(), tiny_llama()
    calibrate(chained, batches, gptq(), pipeline="layer_sequential", device="cpu")
    eager_in_step(walked, batches, gptq())
    same_state(chained, walked)


class Layer(nn.Module):
    """One Linear, and a habit of layers."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.inner, self.habit = nn.Linear(8, 8), habit

    def forward(self, x: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> torch.Tensor | tuple[torch.Tensor]:
        if self.habit == "input in place":
            x.mul_(0.5)
        if self.habit == "residual in place":
            x += self.inner(x) * scale
            return x
        if self.habit == "reads another":
            return self.inner(x + other)
        if self.habit == "tuple":
            return (self.inner(x),)
        return self.inner(x) * scale


class Chain(nn.Module):
    """Layers with habits, and what is done between the layers."""

    def __init__(self, habits: list[str], glue: str) -> None:
        super().__init__()
        self.embed, self.glue = nn.Linear(8, 8), glue
        self.layers = nn.ModuleList([Layer(habit) for habit in habits])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        other, kept = mask * 2, [x.clone()]
        for layer in self.layers:
            if self.glue == "the input twice":
                other = x
            elif self.glue == "made of the input":
                other = x.tanh()
            elif self.glue == "skip":
                other = kept[max(0, len(kept) - 2)]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.glue == "autocast"):
                out = layer(x, other, scale=0.5)
            x = out[0] if isinstance(out, tuple) else out
            if self.glue == "in place":
                x.add_(1)
            elif self.glue == "out of place" or (self.glue == "with small batches" and len(mask) < 4):
                x = x + 1
            elif self.glue == "in place with small batches" and len(mask) < 4:
                x.add_(1)
            kept.append(x.clone())
        return x


HABITS = ["plain", "input in place", "residual in place", "reads another", "tuple"]
BREAKING = ["in place", "out of place", "with small batches", "in place with small batches"]


def chain_options() -> dict[str, Any]:
    return {"targets": [r"re:layers\.\d+$"], "pipeline": "layer_sequential", "device": "cpu"}


@settings(max_examples=40, deadline=None)
@given(
    habits=st.lists(st.sampled_from(HABITS), min_size=2, max_size=4),
    glue=st.sampled_from(["nothing", "the input twice", "made of the input", "skip", *BREAKING]),
    seed=st.integers(0, 3),
)
def test_a_random_chain_is_right_or_refused(habits: list[str], glue: str, seed: int) -> None:
    """What is accepted equals the eager walk; a chain is accepted, and what surely is none is refused."""

    def modifier() -> QuantizationModifier:
        return QuantizationModifier(scheme="FP8", targets=["Linear"], ignore=["embed"])

    torch.manual_seed(seed)
    chained = Chain(habits, glue).requires_grad_(False)
    walked = copy.deepcopy(chained)
    batches = [{"x": torch.randn(rows, 8), "mask": torch.randn(rows, 8)} for rows in (4, 6, 3)]
    try:
        calibrate(chained, copy.deepcopy(batches), modifier(), **chain_options())
    except ModelError as error:
        assert glue != "nothing", error
        return
    assert glue not in BREAKING
    eager_in_step(walked, batches, modifier(), chain_options()["targets"])
    same_state(chained, walked)


@pytest.mark.parametrize(
    ("glue", "reason"),
    [
        ("in place", r"the output of layers\.0 is not the input of layers\.1"),
        ("the input twice", r"an argument of layers\.1 besides its input depends on other layers"),
        ("made of the input", r"an argument of layers\.1 besides its input depends on other layers"),
        ("skip", r"an argument of layers\.2 besides its input depends on other layers"),
        ("autocast", r"layers\.0 is called under torch\.autocast \(cpu torch\.bfloat16\), which a chain would leave"),
        (
            "with small batches",
            r"a batch changes the output of layers\.0 before it calls layers\.1\. Calibrate on batches",
        ),
    ],
)
def test_what_is_no_chain_is_refused(glue: str, reason: str) -> None:
    batches = [{"x": torch.randn(rows, 8), "mask": torch.randn(rows, 8)} for rows in (4, 3)]
    modifier = QuantizationModifier(scheme="FP8", ignore=["embed"])
    with pytest.raises(ModelError, match=f"layer_sequential pipeline cannot run Chain.*{reason}"):
        calibrate(Chain(["plain"] * 3, glue), batches, modifier, **chain_options())


class Skipping(Branching):
    def forward(self, x: torch.Tensor, most: int = 2) -> torch.Tensor:
        for layer in self.layers[:most]:
            x = layer(x)
        return x


def test_a_batch_that_skips_a_layer_is_refused() -> None:
    batches = [{"x": torch.randn(2, 32)}, {"x": torch.randn(2, 32), "most": 1}]
    options = {**chain_options(), "modifiers": gptq(ignore=["embed"])}
    with pytest.raises(ModelError, match=r"a batch ends before it calls layers\.1, which the first one calls"):
        calibrate(Skipping(), batches, **options)
    with pytest.raises(ModelError, match=r"a batch calls no more targets where the first one calls layers\.1.*'basic'"):
        calibrate(Skipping(), batches, suspended=True, **options)


class Communicating(Branching):
    """Layers that tell each other through an object beside the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Telling() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        board = Board()
        for layer in self.layers:
            x = layer(x, board)
        return x


class Board:
    said: torch.Tensor | None = None


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, board: Board) -> torch.Tensor:
        x = self.inner(x if board.said is None else x + board.said)
        board.said = x
        return x


def test_layers_that_share_an_object_are_refused() -> None:
    batches = [{"x": torch.randn(2, 32)} for _ in range(2)]
    with pytest.raises(ModelError, match="its layers give another result one by one than in the model's own forward"):
        calibrate(Communicating(), batches, gptq(ignore=["embed"]), **chain_options())
    hung, walked = Communicating(), Communicating()
    walked.load_state_dict(hung.state_dict())
    calibrate(hung, batches, gptq(ignore=["embed"]), suspended=True, **chain_options())
    eager_in_step(walked, batches, gptq(ignore=["embed"]), chain_options()["targets"])
    same_state(hung, walked)


class UnderModes(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
        return x.float()


class Witness(QuantizationModifier):
    """Notes the modes under which the layers run and under which it commits."""

    def __init__(self) -> None:
        super().__init__(scheme="FP8", ignore=["embed"])
        self.committing: list[tuple[bool, ...]] = []

    def commit(self, scope: Any) -> Any:
        self.committing.append(modes())
        return super().commit(scope)


def modes() -> tuple[bool, ...]:
    return torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()


def test_modes_that_a_suspended_forward_holds_stay_inside_of_it() -> None:
    before, grad = modes(), torch.is_grad_enabled()
    model, inside = UnderModes(), list[tuple[bool, ...]]()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: inside.append(modes()[:2]))
    witness = Witness()
    calibrate(model, [{"x": torch.randn(6, 32)} for _ in range(3)], witness, suspended=True, **chain_options())
    assert set(witness.committing) == {before}
    assert set(inside) == {(True, True)}
    assert (modes(), torch.is_grad_enabled()) == (before, grad)


@pytest.mark.parametrize("fails", [False, True])
def test_suspended_forwards_end_and_leave_nothing_behind(fails: bool) -> None:
    before, grad = modes(), torch.is_grad_enabled()
    held: list[weakref.ref[torch.Tensor]] = []

    class Holding(UnderModes):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x * 2
            held.append(weakref.ref(state))
            return super().forward(state)

    class Failing(Witness):
        def commit(self, scope: Any) -> Any:
            if fails and scope.index:
                raise OptionError("on purpose")
            return super().commit(scope)

    batches = [{"x": torch.randn(6, 32)} for _ in range(3)]
    if fails:
        with pytest.raises(OptionError, match="on purpose"):
            calibrate(Holding(), batches, Failing(), suspended=True, **chain_options())
    else:
        calibrate(Holding(), batches, Failing(), suspended=True, **chain_options())
    gc.collect()
    assert len(held) == 4
    assert [reference() for reference in held] == [None] * 4
    assert (modes(), torch.is_grad_enabled()) == (before, grad)
