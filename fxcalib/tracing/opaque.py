"""Runs opaque code while a forward is recorded: on fakes for the metadata of its result, and really for answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxcalib.tracing.answers import Answers
from fxcalib.tracing.errors import TraceError
from fxcalib.tracing.graph import GraphTracer, is_mutable
from fxcalib.tracing.leaves import LeafCache
from fxcalib.tracing.modes import Modes
from fxcalib.tracing.preserve import FakeWeights, SavedTensors
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.standins import run_on_stand_ins
from fxcalib.tracing.structure import call_module, flatten, is_symbolic
from fxcalib.tracing.torch_private import FakeTensor, get_proxy_slot, unset_fake_temporarily
from fxcalib.tracing.values import UNKNOWN


class OpaqueCode:
    """Runs modules and wrapped functions that the graph does not look into."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        device: torch.device,
        tracer: GraphTracer,
        env: Sizes,
        modes: Modes,
        answers: Answers,
    ) -> None:
        self._model, self._names, self._device = model, names, device
        self._tracer, self._env, self._modes, self._answers = tracer, env, modes, answers
        self._cache = LeafCache()
        self.weights = FakeWeights()
        self.saved = SavedTensors()
        """Buffers as they were before modules were run on real values."""

    def run_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        # the fake run replaces `forward`, not `__call__`: hooks that the model itself registers (transformers collects
        # hidden states with them) then run exactly once, here as in replay
        forward, own = module.forward, module.__dict__.get("forward")

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own

        def once(*a: Any, **k: Any) -> Any:
            restore()
            run, told = partial(self._informed, forward, module), lambda: self._answers.told
            return self._cache.call(run, module, self._names[id(module)], a, k, told)

        module.__dict__["forward"] = once
        try:
            with self._modes.opaquely():
                return original(module, *args, **kwargs)
        finally:
            restore()

    def _informed(self, forward: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Run an opaque module on fakes. Where numbers had to be guessed, real ones among its arguments go first."""
        guesses = self._answers.guesses
        result = self.run_or_stand_in(forward, module, args, kwargs)
        if self._answers.guesses == guesses or not any(self._is_known(leaf) for leaf in flatten((args, kwargs))[0]):
            return result
        with suppress(Exception):
            return self._stand_in(forward, module, args, kwargs)
        return result

    def run_or_stand_in(
        self, run: Callable[..., Any], module: nn.Module | None, args: Any, kwargs: Any, *, call_modules: bool = False
    ) -> Any:
        """Run a module on fakes; the innermost that cannot be runs on real stand-ins, else the one around it."""
        try:
            return run(*args, **kwargs)
        except Exception as error:
            try:
                return self._stand_in(run, module, args, kwargs, call_modules=call_modules)
            except Exception as again:
                # a wrapped function is refused for what it does, not for being unable to run on fakes
                raise (again if isinstance(again, TraceError) and self._modes.function else error) from None

    def _stand_in(
        self, run: Callable[..., Any], module: nn.Module | None, args: Any, kwargs: Any, *, call_modules: bool = False
    ) -> Any:
        used: dict[fx.Node, torch.Tensor] = {}
        _refuse_objects(flatten((args, kwargs))[0])

        def known(tensor: torch.Tensor) -> torch.Tensor | None:
            value = self._answers.known(tensor, call_modules=call_modules)
            if value is not None and not tensor.is_floating_point():
                slot: Any = get_proxy_slot(tensor, self._tracer, None)
                used[slot.proxy.node] = value
            return value

        with self._modes.on_real_tensors():
            result, matched = run_on_stand_ins(
                run, module, args, kwargs, sizes=self._env, known=known, originals=self.weights.originals
            )
        _refuse_objects(flatten(result)[0])
        if not matched:  # a size of the result follows from no other: it hangs on the data
            for node, value in used.items():
                with unset_fake_temporarily():
                    listed = value.tolist()
                self._answers.tell(node, listed)
        return result

    def _is_known(self, leaf: Any) -> bool:
        return isinstance(leaf, FakeTensor) and not leaf.is_floating_point() and self._answers.known(leaf) is not None

    def run_really(self, name: str, args: Any, kwargs: Any) -> Any:
        """The result of a module on real values; `UNKNOWN` where it has no weights."""
        module = self._model.get_submodule(name)
        with self._modes.on_real_tensors(), self.weights.suspended():
            if any(weight.is_meta for weight in module.parameters()):
                return UNKNOWN
            self.saved.save(module.buffers())
            return call_module(module, args, kwargs, self._device)


def _refuse_objects(leaves: list[Any]) -> None:
    """A run on stand-ins would leave real tensors in objects, which the trace would go on with."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and not is_symbolic(leaf) and is_mutable(leaf):
            raise TraceError(f"a {type(leaf).__name__} cannot take part in a run on stand-ins", kind="mutated object")
