"""What kind of code runs while a forward is recorded: glue, an opaque module on fakes, or code on real tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.torch_private import disable_proxy_modes_tracing


class Modes:
    """The one that holds now, and contexts that change it."""

    def __init__(self, env: Sizes) -> None:
        self._env = env
        self.recording = False
        """Whether the model's forward runs to be recorded."""
        self.function = ""
        """The wrapped function that runs, by name."""
        self.inside = 0
        """How deep in code that is not recorded."""
        self.on_fakes = 0
        """How deep in code that runs on fakes for the metadata of its result alone."""

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded: the forward of an ancestor, not of an opaque module."""
        return self.recording and not self.inside

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Code that leaves no nodes."""
        self.inside += 1
        try:
            with disable_proxy_modes_tracing():
                yield
        finally:
            self.inside -= 1

    @contextmanager
    def opaquely(self) -> Iterator[None]:
        """Code that runs on fakes for the metadata of its result alone."""
        with self.unrecorded(), self._env.suppress_guards(), self._env.ignore_fresh_unbacked_symbols():
            self.on_fakes += 1
            try:
                yield
            finally:
                self.on_fakes -= 1

    @contextmanager
    def on_real_tensors(self) -> Iterator[None]:
        """Code that runs on real tensors, also within some that runs on fakes."""
        on_fakes, self.on_fakes = self.on_fakes, 0
        try:
            yield
        finally:
            self.on_fakes = on_fakes
