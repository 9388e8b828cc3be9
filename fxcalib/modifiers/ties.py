"""Input and output embeddings that are one parameter, until one of them is quantized."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class UntiedWeights:
    """What was taken apart, so that it can be tied again."""

    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    """Module that got a weight of its own -> the parameter that it had."""
    configs: list[Any] = field(default_factory=list)
    """Configs that called the weights tied."""

    def tie_again(self, model: nn.Module, names: Container[str]) -> None:
        """Undo it for those of `names`, and in the configs where none is left; then forget it all."""
        left = [name for name in self.weights if name not in names]
        for name, weight in self.weights.items():
            if name not in left:
                model.get_submodule(name).weight = weight
        for config in () if left else self.configs:
            config.tie_word_embeddings = True
        self.weights, self.configs = {}, []


def tied_to(model: nn.Module, name: str) -> list[str]:
    """Parameters of other modules that are the weight of module `name`; one module of two names is no tie."""
    module = model.get_submodule(name)
    owners = (owner for owner, p in model.named_parameters(remove_duplicate=False) if p is module.weight)
    return [owner for owner in owners if model.get_submodule(owner.rpartition(".")[0]) is not module]


def is_embedding_tie(model: nn.Module, name: str) -> bool:
    """Whether the weight of module `name` belongs to the model's input and output embeddings and to nothing else.

    Such a tie is one of the config: a checkpoint that calls them untied holds both. Others are in the model's code.
    """
    ends = _ends(model)
    owners = {id(model.get_submodule(owner.rpartition(".")[0])) for owner in tied_to(model, name)}
    own = id(model.get_submodule(name))
    return len(ends) == 2 and owners | {own} == {id(end) for end in ends}


def untie(model: nn.Module, names: Iterable[str]) -> UntiedWeights:
    """Give modules that are tied embeddings weights of their own, and say so in the model's config."""
    untied = UntiedWeights()
    for name in names:
        if tied_to(model, name):
            module = model.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            untied.weights[name] = weight
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if untied.weights:
        config = getattr(model, "config", None)
        configs = [config, config.get_text_config()] if config is not None else []
        for each in {id(c): c for c in configs}.values():
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False
                untied.configs.append(each)
    return untied


def _ends(model: nn.Module) -> list[nn.Module]:
    finds = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [end for find in finds if callable(find) if isinstance(end := find(), nn.Module)]
