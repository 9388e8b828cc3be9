"""What becomes one node: a call of a module below the glue or of a wrapped function, what is put on such a module."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, update_wrapper
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from fxcalib.tracing.answers import Answers
from fxcalib.tracing.errors import TraceError, source_of_frame
from fxcalib.tracing.graph import GraphTracer
from fxcalib.tracing.guards import Known, LeafCheck
from fxcalib.tracing.modes import Modes
from fxcalib.tracing.opaque import OpaqueCode
from fxcalib.tracing.state import GlueState
from fxcalib.tracing.structure import PLAIN, flatten, is_native, is_symbolic, leaves_of, unflatten
from fxcalib.tracing.targets import Targets
from fxcalib.tracing.torch_private import FakeTensor, fetch_sym_proxy, get_proxy_slot, track_tensor_tree
from fxcalib.tracing.wrapped_calls import FunctionRun, sized_as_given


class Interception:
    """Stands between the model and its modules while the forward runs, and records their calls."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        targets: Targets,
        tracer: GraphTracer,
        modes: Modes,
        answers: Answers,
        code: OpaqueCode,
        state: GlueState,
        mutated: dict[fx.Node, list[fx.Node]],
    ) -> None:
        """Record into the graph of `tracer`, and in `mutated` which arguments and buffers a call writes to."""
        self._model, self._names, self._targets = model, names, targets.names
        self._ancestors = {id(model.get_submodule(name)) for name in targets.ancestors}
        self._tracer, self._modes, self._answers, self._code, self._state = tracer, modes, answers, code, state
        self._mutated = mutated
        self._calls: list[tuple[fx.Node, nn.Module]] = []
        self._assigned: dict[int, list[fx.Node]] = {}
        """Module below the glue, by id -> what the glue assigns to its attributes."""
        self.checks: dict[fx.Node, LeafCheck] = {}
        """Call -> what its result has to be like."""

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded: the forward of an ancestor, not of an opaque module."""
        return self._modes.in_glue

    def call(self, original: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The result of `module(*args, **kwargs)`, whose `nn.Module.__call__` is `original`."""
        self._refuse_in_function(module)
        if self._modes.on_fakes:
            return self._code.run_or_stand_in(partial(original, module), module, args, kwargs)
        if not self.in_glue or id(module) in self._ancestors or id(module) not in self._names:
            return original(module, *args, **kwargs)
        return self._leaf(original, module, args, kwargs)

    def intercept_forwards(self) -> None:
        """Record targets whose `forward` is called past `__call__` as well. What is set here, the model loses again."""
        for name in self._targets:
            module = self._model.get_submodule(name)
            entered = partial(self._enter, module, module.forward)
            module.__dict__["forward"] = update_wrapper(entered, module.forward)  # with its signature

    def _enter(self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._refuse_in_function(module)
        if not self.in_glue:
            return forward(*args, **kwargs)
        return self._leaf(lambda target, /, *a, **k: target.forward(*a, **k), module, args, kwargs)

    def _leaf(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self._names[id(module)]
        run = partial(self._code.run_module, original, module)
        buffers = list(module.buffers())
        call, result = self._opaque("call_module", name, name, run, args, kwargs, buffers)
        self._calls.append((call.node, module))
        if self._assigned:
            call.node.meta["after"] = [node for inner in module.modules() for node in self._assigned.get(id(inner), ())]
        return result

    def assign(self, original: Callable[..., Any], module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of `module`, whose `nn.Module.__setattr__` is `original`."""
        if self.in_glue and id(module) in self._names:
            if id(module) in self._ancestors:
                self._state.assigned(module, name, sys._getframe(2))
            else:
                self._record_assignment(module, name, value)
        original(module, name, value)

    def _record_assignment(self, module: nn.Module, name: str, value: Any) -> None:
        """What the glue puts on a module below it, which may read it when called, the subgraphs put there as well."""
        tracer = self._tracer
        held = fx.Proxy(tracer.object_node(module), tracer)
        node = tracer.create_proxy("call_function", setattr, (held, name, self.proxy(value)), {}).node
        before = self._assigned.setdefault(id(module), [])
        calls = [call for call, called in self._calls if any(inner is module for inner in called.modules())]
        node.meta["after"] = [*calls, *before]
        before.append(node)

    def _opaque(
        self,
        kind: str,
        target: Any,
        name: str,
        run: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        buffers: Sequence[torch.Tensor] = (),
    ) -> tuple[fx.Proxy, Any]:
        """One node for a call, whose fake result is `run(args, kwargs)`; what it writes to is noted, `buffers` too."""
        tracer = self._tracer
        leaves, structure = flatten((args, kwargs))
        proxies = [self.proxy(leaf) for leaf in leaves]
        if is_native(structure):
            proxy_args, proxy_kwargs = unflatten(structure, *proxies)
        else:
            spec = fx.Proxy(tracer.object_node(structure), tracer)
            pair: Any = tracer.create_proxy("call_function", unflatten, (spec, *proxies), {})
            proxy_args, proxy_kwargs = tuple(pair[0][i] for i in range(len(args))), {k: pair[1][k] for k in kwargs}
        call = tracer.create_proxy(kind, target, proxy_args, proxy_kwargs)
        versions = [(x, x._version) for x in (*leaves, *buffers) if isinstance(x, torch.Tensor)]
        result = run(args, kwargs)
        tracer.settle(leaves)
        written = [self.proxy(x).node for x, version in versions if x._version != version]
        if written:
            self._mutated[call.node] = written
        self._track(call, name, result)
        return call, result

    def call_function(self, function: FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a wrapped function as one node; where nothing is recorded, call it."""
        if not self.in_glue:
            return self._call_original(original, args, kwargs)
        self._modes.function = name = f"{function.__module__}.{function.__qualname__}"
        run = FunctionRun(name, original, on_fakes=lambda: self._modes.on_fakes > 0)
        try:
            call, result = self._opaque("call_function", function, name, partial(self._run_function, run), args, kwargs)
        finally:
            self._modes.function = ""
        call.node.meta["wrapped"] = name
        leaves = flatten((args, kwargs))[0]
        if run.changed:
            changed = [self.proxy(leaves[i]).node for i in sorted(run.changed)]
            self._mutated[call.node] = list(dict.fromkeys([*self._mutated.get(call.node, []), *changed]))
        if run.stood_in and not sized_as_given(result, leaves) and not self._answers.depends_on_modules(call.node):
            call.node.meta["look_first"] = True
        self._guard_numbers(call, run, result)
        return result

    def _run_function(self, run: FunctionRun, args: Any, kwargs: Any) -> Any:
        module = next((x for x in flatten((args, kwargs))[0] if isinstance(x, nn.Module)), None)
        with self._modes.opaquely(), nullcontext() if module is None else self._state.unwatched():
            return self._code.run_or_stand_in(run, module, args, kwargs, call_modules=True)

    def _call_original(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves = flatten((args, kwargs))[0]
        if any(isinstance(x, FakeTensor) for x in leaves) or not any(isinstance(x, nn.Module) for x in leaves):
            return original(*args, **kwargs)
        with self._code.weights.suspended():
            return original(*args, **kwargs)

    def _guard_numbers(self, call: fx.Proxy, run: FunctionRun, result: Any) -> None:
        """Numbers that a wrapped function returns go into the trace as they are: they are looked at, and guarded."""
        results, structure = flatten(result)
        numbers = [i for i, x in enumerate(results) if x is not None and isinstance(x, PLAIN)]
        if not numbers:
            return
        tracer = self._tracer
        spec = fx.Proxy(tracer.object_node(structure), tracer)
        listed: Any = tracer.create_proxy("call_function", leaves_of, (spec, call), {})
        for i in numbers:
            name = f"{run.name.rpartition('.')[-1]}_result_{i}"
            node = tracer.create_proxy("call_function", operator.getitem, (listed, i), {}, name=name).node
            real = self._answers.listed(node, call_modules=True)
            if real is None and run.stood_in:
                raise TraceError(
                    f"the wrapped function {run.name} returns {results[i]!r}, which depends on data that is not known "
                    "while tracing: trace the model with weights and a real batch",
                    kind="value not known while tracing",
                )
            if real is not None and real != results[i]:
                raise TraceError(
                    f"the wrapped function {run.name} returned {results[i]!r} at first and {real!r} when called again "
                    "on the same batch: let it return tensors"
                )
            self._answers.guard(Known((node,), source_of_frame(sys._getframe(2)), results[i]))

    def _refuse_in_function(self, module: nn.Module) -> None:
        if not self._modes.function or id(module) not in self._names:
            return
        name = self._names[id(module)]
        what = f"the {'sequential target' if name in self._targets else 'module'} {name or type(module).__name__}"
        if name in self._targets or next(module.parameters(), None) is not None:
            raise TraceError(
                f"the wrapped function {self._modes.function} calls {what}, which would be "
                "hidden from calibration: wrap a smaller function, one that calls no module with weights",
                kind="module in a wrapped function",
            )

    def _track(self, call: fx.Proxy, name: str, result: Any) -> None:
        tracer = self._tracer
        results, structure = flatten(result)
        plain = all(isinstance(x, (torch.Tensor, *PLAIN)) or is_symbolic(x) for x in results)
        if is_native(structure) and plain:
            track_tensor_tree(result, call, constant=None, tracer=tracer)
        else:
            spec = fx.Proxy(tracer.object_node(structure), tracer)
            listed = tracer.create_proxy("call_function", leaves_of, (spec, call), {})
            visible = [x if isinstance(x, torch.Tensor) or is_symbolic(x) else None for x in results]
            track_tensor_tree(visible, listed, constant=None, tracer=tracer)
        described = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else None for x in results)
        self.checks[call.node] = LeafCheck(name, structure, described)

    def proxy(self, value: Any) -> Any:
        """What stands for `value` in the graph."""
        tracer = self._tracer
        if isinstance(value, torch.Tensor):
            slot = get_proxy_slot(value, tracer, None)
            return slot.proxy if slot is not None else fx.Proxy(tracer.create_arg(value), tracer)
        if is_symbolic(value):
            return fetch_sym_proxy(tracer)(value)
        return value if isinstance(value, PLAIN) else fx.Proxy(tracer.object_node(value), tracer)
