"""Arguments and targets that the pruning modifiers refuse, and what they warn of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layerwise import tiny_llama, token_batches
from torch import nn

from fxcalib import calibrate
from fxcalib.errors import AlreadyQuantizedError, OptionError, TargetError
from fxcalib.modifiers import (
    GPTQModifier,
    MagnitudePruningModifier,
    QuantizationModifier,
    SparseGPTModifier,
    WandaModifier,
)
from fxcalib.modifiers.base import Modifier
from fxcalib.modifiers.sparsity_modifier import SparsityModifier


def run(model: nn.Module, modifiers: Modifier | list[Modifier]) -> None:
    data: list[dict[str, torch.Tensor]] = [{"input_ids": each} for each in token_batches(2)]
    calibrate(model, data, modifiers, device="cpu", pipeline="layer_sequential")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity 1.0 must be the part of the weights to prune, in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity -0.1 must be the part"),
        ({"sparsity": 50}, "sparsity 50 must be the part"),
        ({"sparsity": "half"}, "sparsity 'half' must be the part"),
        ({"sparsity": float("nan")}, "sparsity nan must be the part"),
        ({}, "mask_structure '0:0' leaves the sparsity open"),
        ({"sparsity": 0.3, "mask_structure": "2:4"}, "sparsity 0.3 contradicts mask_structure '2:4', which keeps 2 of"),
        ({"sparsity": 0.25, "mask_structure": "1:4"}, "keeps 1 of every 4 weights: its sparsity is 0.75"),
        ({"mask_structure": "2-4"}, "mask_structure '2-4' must be 'N:M'"),
        ({"mask_structure": (2, 4)}, r"mask_structure \(2, 4\) must be 'N:M'"),
        ({"mask_structure": "4:4"}, "'4:4' must keep more than none and fewer than all"),
        ({"sparsity": 0.5, "targets": 3}, "target is 3"),
    ],
)
@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier, MagnitudePruningModifier])
def test_arguments_that_cannot_work(kind: type[SparsityModifier], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"owl_m": 5}, "owl_m and owl_lmbda are settings of sparsity_profile='owl'"),
        ({"sparsity_profile": "howl"}, "unknown sparsity_profile 'howl': choose 'owl'"),
        ({"sparsity_profile": "owl", "mask_structure": "2:4"}, "mask_structure '2:4' has one"),
        ({"sparsity_profile": "owl", "owl_m": 0}, "owl_m 0 must be a number above 0"),
        ({"sparsity_profile": "owl", "owl_lmbda": 0.6}, r"owl_lmbda 0.6 takes layers of sparsity 0.5 out of \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("kind", [SparseGPTModifier, WandaModifier])
def test_profiles_that_cannot_work(kind: type[SparsityModifier], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(sparsity=0.5, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPTModifier(sparsity=0.5, block_size=0), "block_size 0 must be a whole number"),
        (lambda: SparseGPTModifier(sparsity=0.5, dampening_frac=2), "dampening_frac 2 must be between 0 and 1"),
        (lambda: MagnitudePruningModifier(sparsity=0.5, final_sparsity=0.6), "are the same option; give one"),
        (lambda: MagnitudePruningModifier(init_sparsity=0.6, final_sparsity=0.5), "init_sparsity 0.6 must be between"),
    ],
)
def test_settings_of_one_modifier_that_cannot_work(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_widths_that_a_structure_does_not_divide_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 30), nn.Linear(30, 32)).requires_grad_(False)
    with pytest.raises(OptionError, match=r"mask_structure '2:4' does not divide the input width of 1 \(30\)"):
        SparseGPTModifier(mask_structure="2:4").attach(model)


def test_sizes_that_kernels_do_not_take_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40)).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"mask_structure '2:4' of 1 \(40, 48\): sparse tensor cores take sizes"):
        MagnitudePruningModifier(mask_structure="2:4").attach(model)
    other = nn.Sequential(nn.Linear(48, 40)).requires_grad_(False)
    MagnitudePruningModifier(mask_structure="4:8").attach(other)


def test_targets_that_cannot_be_pruned_are_refused() -> None:
    model = tiny_llama()
    for targets, message in (
        ("Linaer", r"target 'Linaer' matches no module: did you mean 'Linear'"),
        ("Embedding", "target 'Embedding' matches only Embedding; Linear modules can be pruned"),
    ):
        with pytest.raises(TargetError, match=message):
            WandaModifier(sparsity=0.5, targets=targets).attach(model)
    with pytest.raises(TargetError, match="ignore pattern 'nothing' matches no module"):
        WandaModifier(sparsity=0.5, ignore=["nothing"]).attach(model)
    with pytest.raises(TargetError, match=r"nothing to prune: every module that \['Linear'\] match is ignored"):
        WandaModifier(sparsity=0.5, ignore=["Linear"]).attach(model)
    with pytest.raises(OptionError, match=r"the weight of 'lm_head' is tied to 'model.embed_tokens.weight'"):
        WandaModifier(sparsity=0.5, ignore=[]).attach(tiny_llama(tied=True))


def test_two_modifiers_on_one_module_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(OptionError, match=r"q_proj' is pruned by another modifier already; give each its own targets"):
        run(model, [SparseGPTModifier(sparsity=0.5), WandaModifier(sparsity=0.5)])
    with pytest.raises(
        OptionError, match=r"q_proj' is quantized by a modifier before WandaModifier.*put WandaModifier first"
    ):
        run(tiny_llama(), [GPTQModifier(scheme="W4A16", group_size=32), WandaModifier(sparsity=0.5)])
    quantized = tiny_llama()
    run(quantized, QuantizationModifier(scheme="W4A16", group_size=32))
    with pytest.raises(AlreadyQuantizedError, match="is quantized already"):
        run(quantized, WandaModifier(sparsity=0.5))
