from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import token_batch
from test_pipelines import MIXED, gptq, same_state
from tiny_llama import tiny_llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fxcalib import QuantizationModifier, calibrate
from fxcalib.errors import ModelError, OptionError
from fxcalib.pipelines import get_targets_from_modifiers


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


class Untraceable(nn.Module):
    """A chain of layers behind a branch on a module's result, which no trace can know."""

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


def test_what_cannot_be_traced_runs() -> None:
    batches = [{"x": torch.randn(6, 32)} for _ in range(3)]
    options: dict[str, Any] = {"targets": ["re:layers.\\d+$"], "pipeline": "layer_sequential"}
    chained, hung = Untraceable(), Untraceable()
    modifier = {"ignore": ["embed"], "targets": ["Linear"]}
    report = calibrate(chained, batches, gptq(**modifier), **options)
    calibrate(hung, batches, gptq(**modifier), suspended=True, **options)
    same_state(chained, hung)
    assert [m.measure for m in report.modules] == ["output", "output"]


def test_glue_between_layers_is_noticed() -> None:
    class Scaled(Untraceable):
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
