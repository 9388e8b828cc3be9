"""Let transformers take the path that it takes on data.

Why: `transformers.utils.import_utils.is_tracing` recognises fake tensors and then always materialises attention masks,
so a trace of an unpadded batch would carry a (batch, 1, sequence, sequence) mask and leave the causal attention path
that the model takes in reality (`transformers.masking_utils._ignore_causal_mask_sdpa`). The recorder answers branches
on data from the real batch and guards them, so in the glue fake tensors may pass for data. Inside opaque modules, which
run on fakes only for their metadata, transformers goes on seeing them.

When it can go: when `is_tracing` no longer asks `is_fake_tensor`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracing_patches import Glue


@contextmanager
def fake_tensors_are_data(glue: Glue) -> Iterator[None]:
    """Make `is_fake_tensor` answer False in the glue."""
    module = sys.modules.get("transformers.utils.import_utils")
    if module is None:
        yield
        return
    original = module.is_fake_tensor

    def is_fake_tensor(x: object) -> bool:
        return not glue.in_glue and bool(original(x))

    module.is_fake_tensor = is_fake_tensor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.is_fake_tensor = original  # type: ignore[attr-defined]
