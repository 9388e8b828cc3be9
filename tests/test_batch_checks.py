"""Batches that a model cannot take are refused with the culprit, the cause and the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fxcalib.data import check_batch, fingerprint_batches
from fxcalib.errors import BatchError

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    return LlamaForCausalLM(config)


class Strict(nn.Module):
    """Takes exactly what it names."""

    def forward(self, pixels: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return pixels * scale


class Wrapper(nn.Module):
    """Hands what it does not name to a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Strict()

    def forward(self, pixel: torch.Tensor, **rest: Any) -> Any:
        return self.inner(**rest) + pixel


def test_good_batches_pass(llama: LlamaForCausalLM) -> None:
    check_batch(llama, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 0)
    check_batch(llama, {"inputs_embeds": torch.zeros(1, 3, 8), "use_cache": False, "labels": None}, 0)
    check_batch(llama, {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 3])}, 0)
    check_batch(Strict(), {"pixels": torch.zeros(2), "scale": 2.0}, 0)
    check_batch(Wrapper(), {"pixel": torch.zeros(2), "pixels": torch.zeros(2)}, 0)
    check_batch(nn.Identity(), {"input": [torch.zeros(2), None]}, 0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IDS], "batch 7 is a list; each batch must be a dict of tensors that the model's forward takes"),
        (IDS, "batch 7 is a Tensor; each batch must be a dict"),
        ({}, "batch 7 is an empty dict; check the data loader's collate function"),
        ({"input_ids": IDS[:, :0]}, "batch 7 is empty: 'input_ids' has shape (1, 0); leave out empty"),
        ({"input_ids": [[1, 2]]}, "'input_ids' of batch 7 is a list, no tensor; convert it with torch.tensor"),
        ({"input_ids": IDS.numpy()}, "'input_ids' of batch 7 is a ndarray, no tensor"),
        (
            {"input_idz": IDS, "attention_mask": IDS},
            "batch 7 lacks 'input_ids' (or 'inputs_embeds'), which LlamaForCausalLM.forward needs; "
            "its keys are 'input_idz', 'attention_mask': rename or add one",
        ),
        ({"input_ids": None, "attention_mask": IDS}, "batch 7 lacks 'input_ids'"),
        (
            {"input_ids": IDS, "attention_maks": IDS},
            "LlamaForCausalLM.forward takes no 'attention_maks', which batch 7 has; did you mean 'attention_mask'?",
        ),
        ({"input_ids": IDS.float()}, "'input_ids' of batch 7 has dtype torch.float32; token ids must be integers"),
        ({"input_ids": IDS[0]}, "'input_ids' of batch 7 has shape (3,) where (batch, sequence) is expected"),
        (
            {"input_ids": torch.tensor([[3, 32, 5]])},
            "token id 32 in 'input_ids' of batch 7 is not in the model's vocabulary of 32 tokens (0 to 31); "
            "the data was probably tokenized with another model's tokenizer",
        ),
        ({"input_ids": torch.tensor([[3, -100]])}, "token id -100 in 'input_ids' of batch 7 is not in"),
    ],
)
def test_batches_that_a_causal_model_cannot_take(llama: LlamaForCausalLM, batch: object, message: str) -> None:
    with pytest.raises(BatchError) as caught:
        check_batch(llama, batch, 7)
    assert message in str(caught.value)


def test_signatures_without_open_ends() -> None:
    with pytest.raises(BatchError) as caught:
        check_batch(Strict(), {"pixel": torch.zeros(2)}, 0)
    assert str(caught.value) == (
        "batch 0 lacks 'pixels', which Strict.forward needs; its keys are 'pixel': rename or add one"
    )
    with pytest.raises(BatchError, match=r"Strict.forward takes no 'scael', which batch 1 has; did you mean 'scale'\?"):
        check_batch(Strict(), {"pixels": torch.zeros(2), "scael": 1.0}, 1)
    with pytest.raises(BatchError, match="takes no 'extra', which batch 1 has; choose from pixels, scale"):
        check_batch(Strict(), {"pixels": torch.zeros(2), "extra": torch.zeros(2)}, 1)


def test_encoder_decoder_models() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0)
    )
    check_batch(model, {"input_ids": IDS, "labels": IDS}, 0)
    with pytest.raises(BatchError, match="token id 99 in 'decoder_input_ids'"):
        check_batch(model, {"input_ids": IDS, "decoder_input_ids": IDS + 94}, 0)


@dataclass
class Pixels:
    pixels: torch.Tensor
    size: int = 2


def test_dataclasses_are_looked_into() -> None:
    check_batch(nn.Identity(), {"input": Pixels(torch.zeros(2))}, 0)
    check_batch(nn.Identity(), {"input": [{"key": Pixels(torch.zeros(2))}]}, 0)
    with pytest.raises(BatchError, match=r"batch 3 is empty: 'input' has shape \(0,\)"):
        check_batch(nn.Identity(), {"input": Pixels(torch.zeros(0))}, 3)
    with pytest.raises(BatchError, match="'input' of batch 3 is a Pixels, no tensor"):
        check_batch(nn.Identity(), {"input": Pixels(None)}, 3)  # type: ignore[arg-type]
    large = torch.zeros(5000)
    other = large.clone()
    other[2500] = 1  # printed, they are the same
    prints = [fingerprint_batches([{"input": Pixels(x)}]) for x in (large, large.clone(), other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_loss_mask_is_checked_but_not_for_the_model(llama: LlamaForCausalLM) -> None:
    for mask in (torch.ones_like(IDS), torch.tensor([[True, False, True]])):
        check_batch(llama, {"input_ids": IDS, "loss_mask": mask}, 0)
    check_batch(Strict(), {"pixels": torch.zeros(2, 3), "loss_mask": torch.ones(2, 3)}, 0)
    for mask, message in (
        ([1, 1, 1], "'loss_mask' of batch 2 is a list, no tensor"),
        (torch.ones(3), r"'loss_mask' of batch 2 has shape \(3,\) where a tensor \(batch, sequence\) is expected"),
        (torch.ones(1, 2), r"'loss_mask' of batch 2 has shape \(1, 2\), but 'input_ids' \(1, 3\)"),
        (torch.full((1, 3), 0.5), "'loss_mask' of batch 2 holds other values than 0 and 1"),
    ):
        with pytest.raises(BatchError, match=message):
            check_batch(llama, {"input_ids": IDS, "loss_mask": mask}, 2)
