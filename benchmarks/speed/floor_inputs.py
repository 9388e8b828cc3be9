"""What the floor computes on: decoder layers, their input, and the distinct inputs of the Linears in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Distinct(NamedTuple):
    """An input that several Linears share, and their weights."""

    rows: Tensor
    """(token, input channel), bfloat16."""
    weight: Tensor
    """The weights, stacked along output channels: (output channel, input channel), bfloat16."""


class Shapes:
    """The decoder layers of a Llama on `device`, and the hidden states (sample, token, channel) that enter them.

    Args:
        model: as transformers builds it; its layers move to `device`.
        tokens: (sample, token) int64.
        device: where to compute.
    """

    def __init__(self, model: Any, tokens: Tensor, device: torch.device) -> None:
        decoder = model.model
        self.layers: list[nn.Module] = [layer.to(device) for layer in decoder.layers]
        self.seq_len = tokens.shape[1]
        self._hidden: Tensor = decoder.embed_tokens.to(device)(tokens.to(device))
        positions = torch.arange(self.seq_len, device=device)[None]
        self._rotary: Any = decoder.rotary_emb.to(device)(self._hidden, positions)

    def forward_once(self, samples: int) -> Tensor:
        """One forward of the first layer."""
        return self._forward(self.layers[0], self._hidden[:samples])

    def forwards(self, samples: int, passes: int) -> None:
        """All samples through all layers in batches; the last of `passes` through a layer gives the next its input."""
        values = list(torch.split(self._hidden, samples))
        for layer in self.layers:
            for _ in range(passes - 1):
                for value in values:
                    self._forward(layer, value)
            for index, value in enumerate(values):
                values[index] = self._forward(layer, value)

    def distinct(self, samples: int) -> list[Distinct]:
        """Of the first layer, for so many samples: each tensor that enters Linears, once."""
        users: dict[int, list[nn.Linear]] = {}
        inputs: dict[int, Tensor] = {}

        def hook(module: nn.Module, positional: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            inputs[id(positional[0])] = positional[0]  # kept, so that no other tensor gets the same id
            users.setdefault(id(positional[0]), []).append(module)

        linears = [module for module in self.layers[0].modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(hook) for module in linears]
        try:
            self.forward_once(samples)
        finally:
            for handle in handles:
                handle.remove()
        return [
            Distinct(inputs[key].flatten(0, 1), torch.cat([module.weight.detach() for module in modules]))
            for key, modules in users.items()
        ]

    def weights(self) -> list[Tensor]:
        """The weights of all Linears in the layers, each (output channel, input channel)."""
        modules = (module for layer in self.layers for module in layer.modules())
        return [module.weight.detach() for module in modules if isinstance(module, nn.Linear)]

    def _forward(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output: Tensor = layer(hidden, attention_mask=None, position_embeddings=self._rotary)
        return output
