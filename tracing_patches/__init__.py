"""Exceptions to the rule that a model is traced as it is: one small file each, applied only while tracing.

Each is a `Patch`, the mechanism of `fxcalib.wrap`. Its file says why it is needed, which line it works around and when
it can go; a test fails as soon as the installed libraries no longer need it.
"""

from __future__ import annotations

from fxcalib.tracing.patching import Patch
from tracing_patches.transformers_fake_tensors import fake_tensors_are_data

PATCHES: tuple[Patch, ...] = (fake_tensors_are_data,)
