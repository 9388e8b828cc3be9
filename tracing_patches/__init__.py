"""Exceptions to the rule that a model is traced as it is: one small file each, applied only while tracing.

Each patch is a context manager that takes the recorder, and says in its docstring why it is needed, which line it works
around and when it can go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from tracing_patches.transformers_fake_tensors import fake_tensors_are_data


class Glue(Protocol):
    """What a patch may ask of the recorder."""

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded."""


class Patch(Protocol):
    """Enters a patch for the length of one trace."""

    def __call__(self, glue: Glue) -> AbstractContextManager[None]: ...


PATCHES: tuple[Patch, ...] = (fake_tensors_are_data,)


@contextmanager
def active_patches(glue: Glue) -> Iterator[None]:
    """Apply all patches while the context is open."""
    with ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(patch(glue))
        yield
