"""Let transformers take the path that it takes on data.

Why: `transformers.utils.import_utils.is_tracing` recognises fake tensors and then always materialises attention masks,
so a trace of an unpadded batch would carry a (batch, 1, sequence, sequence) mask and leave the causal attention path
that the model takes in reality (`transformers.masking_utils._ignore_causal_mask_sdpa`). The recorder answers branches
on data from the real batch and guards them, so in the glue fake tensors may pass for data. Inside opaque modules, which
run on fakes only for their metadata, transformers goes on seeing them.

When it can go: when `is_tracing` no longer asks `is_fake_tensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxcalib.tracing.patching import Glue, Patch


def _seen_in_modules_only(glue: Glue, original: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    return not glue.in_glue and bool(original(*args, **kwargs))


fake_tensors_are_data = Patch("transformers.utils.import_utils:is_fake_tensor", _seen_in_modules_only)
"""Makes `is_fake_tensor` answer False in the glue."""
