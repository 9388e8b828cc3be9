"""Token batches and comparisons that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import VOCABULARY
from torch import nn
from torch.utils import _pytree as pytree


def token_batch(rows: int, length: int, *, seed: int = 0, left: int = 0, right: int = 0, **more: Any) -> dict[str, Any]:
    """Random tokens; the first row has `left` padded positions, the last `right`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :left] = 0
    mask[-1, length - right :] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


def assert_identical(actual: object, expected: object) -> None:
    """Same types, structures and bits."""
    assert type(actual) is type(expected)
    leaf = lambda x: not isinstance(x, (tuple, list, dict))  # noqa: E731
    have, structure = pytree.tree_flatten(actual, is_leaf=leaf)
    want, wanted = pytree.tree_flatten(expected, is_leaf=leaf)
    assert structure == wanted
    for a, b in zip(have, want, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif hasattr(a, "__dict__"):  # a key-value cache, or one of its layers
            assert_identical(vars(a), vars(b))
        else:
            assert a == b


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
