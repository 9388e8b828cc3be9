"""Records the glue of a model's real `forward` on fake tensors, with every module below the glue as one opaque node.

The forward runs unchanged under a proxy dispatch mode. A call of a module that contains no target is recorded as ONE
`call_module` node on the live module; its fake result comes from running it on fakes with recording off. What is left
in the graph is what the ancestors of the targets do themselves, as ATen operations before dispatch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxcalib.tracing.errors import TraceError, source_of_error, source_of_frame
from fxcalib.tracing.graph import GraphTracer, has_effect
from fxcalib.tracing.guards import InputSpec, Known, LeafCheck, Relation, ShapeGuards, ValueGuard
from fxcalib.tracing.leaves import LeafCache
from fxcalib.tracing.preserve import FakeWeights, fake_weights, intercepted_calls, preserved_state, tensors_of
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.standins import run_on_stand_ins
from fxcalib.tracing.structure import PLAIN, call_module, flatten, is_native, is_symbolic, leaves_of, unflatten
from fxcalib.tracing.targets import Targets
from fxcalib.tracing.torch_private import (
    ConstantSource,
    DimDynamic,
    FakeTensor,
    FakeTensorMode,
    ProxyTorchDispatchMode,
    StatelessSymbolicContext,
    disable_autocast_cache,
    disable_proxy_modes_tracing,
    enable_python_dispatcher,
    fetch_sym_proxy,
    functorch_apis,
    functorch_vmap,
    get_proxy_slot,
    patch_functorch_config,
    patch_fx_config,
    pytree,
    track_tensor_tree,
)
from fxcalib.tracing.values import UNKNOWN, RealPrefix
from tracing_patches import active_patches


@dataclass
class Recording:
    """All that one run of the forward left behind."""

    graph: fx.Graph
    constants: dict[str, Any]
    inputs: InputSpec
    outputs: pytree.TreeSpec
    shape_guards: ShapeGuards
    value_guards: list[ValueGuard]
    leaf_checks: dict[fx.Node, LeafCheck]
    mutated_by: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """Module calls that change argument tensors in place -> the nodes of these arguments."""


class _Questions(TorchFunctionMode):
    """Answers what the model asks of a tensor's data: `bool(x)`, `x.item()`, `x.tolist()`."""

    def __init__(self, answer: Callable[[torch.Tensor, bool], Any]) -> None:
        super().__init__()
        self._answer = answer
        self._tolist = FakeTensor.tolist

    def __enter__(self) -> Any:
        # fake tensors have a method of their own, which a mode does not see
        def tolist(tensor: FakeTensor) -> Any:
            answer = self._answer(tensor, False)
            return self._tolist(tensor) if answer is None else answer

        FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING:
            # a number stays a symbol as long as it can: a trace that has looked at it serves that number alone
            symbolic = _ASKING[func] and args[0].dtype != torch.bool
            answer = self._answer(args[0], symbolic)
            if answer is not None:
                return answer if func is not torch.Tensor.__bool__ else bool(answer)
        if func is torch.Tensor.contiguous:
            # the method would not call the operator where the fake counts as contiguous: the real tensor may not be
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        if func in (torch.Tensor.__iter__, torch.Tensor.unbind, torch.unbind) and isinstance(args[0], FakeTensor):
            parts = _unbind(*args, **(kwargs or {}))
            return iter(parts) if func is torch.Tensor.__iter__ else parts
        if func is torch.tensor and isinstance(args[0], (list, tuple)):
            args = (_stacked(args[0]), *args[1:])
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, (list, tuple)) for i in index):
                args = (args[0], tuple(_stacked(i) for i in index), *args[2:])
        return func(*args, **(kwargs or {}))


def _unbind(tensor: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    # the decomposition of torch squeezes only what is known to be 1, which symbols are not in opaque modules
    if not tensor.ndim:
        raise TypeError("iteration over a 0-d tensor")
    return tuple(tensor.select(dim, i) for i in range(int(tensor.shape[dim])))


def _stacked(values: Any) -> Any:
    """Nested lists that hold tensors as one tensor: `torch.tensor` would look at their data."""
    if not isinstance(values, (list, tuple)):
        return values
    parts = [_stacked(value) for value in values]
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return values
    return torch.stack([part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in parts])


_ASKING = {
    torch.Tensor.__bool__: False,
    torch.Tensor.item: True,
    torch.Tensor.__int__: True,
    torch.Tensor.__index__: True,
    torch.Tensor.__float__: True,
}
"""Functions that look at data, and whether their result may be a symbol."""


class Recorder:
    """Runs a model's forward once and records it."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        device: torch.device,
        *,
        symbolic_data: bool = True,
        symbolic_ones: bool = True,
    ) -> None:
        """Record the forward of `model`, to be run on `device`.

        Without `symbolic_data`, numbers that depend on data are looked at and guarded at once; without `symbolic_ones`,
        a dimension of size 1 in the batch is taken for one that is always 1.
        """
        self._model, self._device = model, device
        self._symbolic_data, self._symbolic_ones = symbolic_data, symbolic_ones
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, str] = {}
        for name, module in modules.items():
            self._names.setdefault(id(module), name)
        self._ancestors = {id(modules[name]) for name in targets.ancestors}
        self._targets = targets.names
        self._tracer = GraphTracer(model)
        self._cache = LeafCache()
        self._env = Sizes()
        self._inside = 0
        self._on_fakes = 0
        self._recording = False
        self._checks: dict[fx.Node, LeafCheck] = {}
        self._values: list[ValueGuard] = []
        self._mutated: dict[fx.Node, list[fx.Node]] = {}
        self._prefix: RealPrefix | None = None
        self._weights = FakeWeights()

    @property
    def asked_data(self) -> bool:
        """Whether the model has asked for numbers that depend on data."""
        return len(self._env.var_to_range) > len(self._env.backed_var_to_val)

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded: the forward of an ancestor, not of an opaque module."""
        return self._recording and not self._inside

    def record(self, batch: Mapping[str, Any]) -> Recording:
        """Run `model(**batch)` on fakes, all sizes of whose tensors are symbols."""
        tracer = self._tracer
        with patch_functorch_config(fake_tensor_propagate_real_tensors=False):
            mode = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True, shape_env=self._env)
        mode.cache_enabled = False  # what was found in an opaque module has made no guards for the glue
        leaves, structure = flatten(dict(batch))
        paths = pytree.tree_flatten_with_path(dict(batch), is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))[0]
        names = tuple(_key(path) for path, _ in paths)
        fakes = [self._fake_input(mode, name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        placeholders: dict[fx.Node, Any] = {}
        tracked = []
        for name, leaf, fake in zip(names, leaves, fakes, strict=True):
            if isinstance(leaf, torch.Tensor):
                proxy = tracer.create_proxy("placeholder", _identifier(name), (), {})
                tracked.append((fake, proxy))
                placeholders[proxy.node] = leaf
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.no_grad())
            stack.enter_context(preserved_state(self._model))
            tracer.existing = {id(t) for t in tensors_of(self._model)}
            attributes = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
            if all(leaf.device.type != "meta" for leaf in placeholders.values()):
                self._prefix = RealPrefix(
                    tracer.graph,
                    # a copy: glue that writes in place must not change the batch
                    lambda: {node: leaf.to(self._device, copy=True) for node, leaf in placeholders.items()},
                    lambda path: self._attribute(path, attributes),
                    self._run_really,
                )
            stack.enter_context(patch_fx_config(backed_size_oblivious=True))
            stack.enter_context(patch_functorch_config(generate_fake_kernels_from_real_mismatches=True))
            self._weights = stack.enter_context(fake_weights(self._model, mode, self._device))
            tracer.weights = dict(self._weights.paths)
            stack.enter_context(self._post_dispatch_vmap())
            stack.enter_context(active_patches(self))
            stack.enter_context(intercepted_calls(self._call))
            self._intercept_forwards()
            stack.enter_context(mode)
            stack.enter_context(enable_python_dispatcher())
            for fake, proxy in tracked:
                track_tensor_tree(fake, proxy, constant=None, tracer=tracer)
            stack.enter_context(
                ProxyTorchDispatchMode(
                    tracer, "symbolic", pre_dispatch=True, _allow_fake_constant=False, _error_on_data_dependent_ops=True
                )
            )
            stack.enter_context(disable_autocast_cache())
            stack.enter_context(_Questions(self._ask))
            self._recording = True
            self._env.oracle = self
            result = self._forward(unflatten(structure, *fakes))
            results, outputs = flatten(result)
            tracer.create_node("output", "output", (tracer.create_arg([self._proxy(x) for x in results]),), {})
            self._recording = False
        self._env.oracle = None
        guarded = {node for value in self._values for node in value.nodes}
        tracer.graph.eliminate_dead_code(lambda node: node in guarded or has_effect(node))
        inputs = InputSpec(structure, names, tuple(fakes))
        guards = ShapeGuards(self._env, inputs)
        return Recording(
            tracer.graph, tracer.constants, inputs, outputs, guards, self._values, self._checks, self._mutated
        )

    def _forward(self, batch: dict[str, Any]) -> Any:
        try:
            return self._model(**batch)
        except TraceError as error:
            if "\n" in str(error):
                raise
            name = type(self._model).__name__
            raise TraceError(f"{name} cannot be traced: {error}\n  at {source_of_error(error)}") from error
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise TraceError(
                f"{type(self._model).__name__} cannot be traced: {type(error).__name__}: {reason}\n"
                f"  at {source_of_error(error)}\n"
                "  If the model itself runs on this batch, wrap the function that holds this line, "
                "or use the basic pipeline, which does not trace."
            ) from error
        finally:
            self._recording = False

    def _fake_input(self, mode: FakeTensorMode, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        here = leaf.device == self._device
        kinds = [DimDynamic.DYNAMIC if n != 1 or self._symbolic_ones else DimDynamic.STATIC for n in leaf.shape]
        return mode.from_tensor(
            leaf if here else torch.empty(leaf.shape, dtype=leaf.dtype, device=self._device),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
        )

    def _attribute(self, path: str, attributes: Mapping[str, torch.Tensor]) -> Any:
        return self._tracer.constants[path] if path in self._tracer.constants else attributes[path]

    def _proxy(self, value: Any) -> Any:
        tracer = self._tracer
        if isinstance(value, torch.Tensor):
            slot = get_proxy_slot(value, tracer, None)
            return slot.proxy if slot is not None else fx.Proxy(tracer.create_arg(value), tracer)
        if is_symbolic(value):
            return fetch_sym_proxy(tracer)(value)
        return value if isinstance(value, PLAIN) else fx.Proxy(tracer.object_node(value), tracer)

    def _call(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._on_fakes:
            return self._run_or_stand_in(partial(original, module), module, args, kwargs)
        if not self.in_glue or id(module) in self._ancestors or id(module) not in self._names:
            return original(module, *args, **kwargs)
        return self._leaf(original, module, args, kwargs)

    def _intercept_forwards(self) -> None:
        """Record targets whose `forward` is called past `__call__` as well. What is set here, the model loses again."""
        for name in self._targets:
            module = self._model.get_submodule(name)
            forward = module.forward

            def entered(*args: Any, m: nn.Module = module, f: Callable[..., Any] = forward, **kwargs: Any) -> Any:
                if not self.in_glue:
                    return f(*args, **kwargs)
                return self._leaf(lambda target, *a, **k: target.forward(*a, **k), m, args, kwargs)

            module.__dict__["forward"] = entered

    def _leaf(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        tracer = self._tracer
        name = self._names[id(module)]
        leaves, structure = flatten((args, kwargs))
        proxies = [self._proxy(leaf) for leaf in leaves]
        if is_native(structure):
            proxy_args, proxy_kwargs = unflatten(structure, *proxies)
        else:
            spec = fx.Proxy(tracer.object_node(structure), tracer)
            pair: Any = tracer.create_proxy("call_function", unflatten, (spec, *proxies), {})
            proxy_args, proxy_kwargs = tuple(pair[0][i] for i in range(len(args))), {k: pair[1][k] for k in kwargs}
        call = tracer.create_proxy("call_module", name, proxy_args, proxy_kwargs)
        versions = [(x, x._version) for x in leaves if isinstance(x, torch.Tensor)]
        result = self._run_on_fakes(original, module, args, kwargs)
        tracer.settle(leaves)
        written = [self._proxy(x).node for x, version in versions if x._version != version]
        if written:
            self._mutated[call.node] = written
        self._track(call, name, result)
        return result

    def _run_on_fakes(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        # the fake run replaces `forward`, not `__call__`: hooks that the model itself registers (transformers collects
        # hidden states with them) then run exactly once, here as in replay
        forward, own = module.forward, module.__dict__.get("forward")

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own

        def once(*a: Any, **k: Any) -> Any:
            restore()
            return self._cache.call(lambda *x, **y: self._run_or_stand_in(forward, module, x, y), module, a, k)

        module.__dict__["forward"] = once
        try:
            with self._unrecorded(), self._env.suppress_guards(), self._env.ignore_fresh_unbacked_symbols():
                self._on_fakes += 1
                try:
                    return original(module, *args, **kwargs)
                finally:
                    self._on_fakes -= 1
        finally:
            restore()

    def _run_or_stand_in(self, run: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module on fakes; the innermost that cannot be runs on real stand-ins, else the one around it."""
        try:
            return run(*args, **kwargs)
        except Exception as error:
            on_fakes, self._on_fakes = self._on_fakes, 0
            try:
                return run_on_stand_ins(
                    run, module, args, kwargs, sizes=self._env, known=self._known, buffers=self._buffers
                )
            except Exception:
                raise error from None
            finally:
                self._on_fakes = on_fakes

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None or self._prefix is None:
            return None
        value = self._prefix.value(slot.proxy.node, call_modules=False)
        return value if isinstance(value, torch.Tensor) else None

    @property
    def _buffers(self) -> Mapping[int, torch.Tensor]:
        return {key: t for key, t in self._weights.originals.items() if not isinstance(t, nn.Parameter)}

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        self._inside += 1
        try:
            with disable_proxy_modes_tracing():
                yield
        finally:
            self._inside -= 1

    def _run_really(self, name: str, args: Any, kwargs: Any) -> Any:
        """The result of a module on real values; `UNKNOWN` where it has no weights."""
        module = self._model.get_submodule(name)
        on_fakes, self._on_fakes = self._on_fakes, 0
        try:
            with self._weights.suspended():
                if any(weight.is_meta for weight in module.parameters()):
                    return UNKNOWN
                return call_module(module, args, kwargs, self._device)
        finally:
            self._on_fakes = on_fakes

    def value_of(self, symbol: sympy.Symbol) -> int | float | None:
        """What a symbol that depends on data is on the traced batch. In opaque modules, where only sizes count, 1."""
        node = self._node_of(symbol)
        value = None if node is None else self._listed(node, call_modules=self._inside == 0)
        return 1 if value is None and self._inside else value

    def assumed(self, fact: sympy.Basic) -> None:
        """Keep what the trace goes on with as a guard. In opaque modules it is no assumption: replay runs them."""
        if not self.in_glue:
            return
        fact = self._env.replace(fact)
        symbols = tuple(sorted(fact.free_symbols, key=str))
        nodes = [self._node_of(symbol) for symbol in symbols]
        known = tuple(node for node in nodes if node is not None)
        if len(known) < len(nodes):
            raise TraceError(f"the model assumes {fact}, which cannot be held against other batches")
        self._guard(Relation(known, source_of_frame(sys._getframe(1)), fact, symbols))

    def _guard(self, guard: ValueGuard) -> None:
        self._values.append(guard)
        if any(self._depends_on_modules(node) for node in guard.nodes):
            self._tracer.create_node("call_function", guard.check, guard.nodes, {})

    def _depends_on_modules(self, node: fx.Node) -> bool:
        seen, pending = {node}, [node]
        while pending:
            current = pending.pop()
            size = current.meta.get("val")
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols <= self._env.backed_var_to_val.keys():
                continue  # a size that follows from those of the batch
            if current.op == "call_module":
                return True
            pending += [source for source in current.all_input_nodes if source not in seen]
            seen.update(current.all_input_nodes)
        return False

    def _node_of(self, symbol: sympy.Symbol) -> fx.Node | None:
        tracked = self._tracer.sympy_expr_tracker.get(symbol)
        if tracked is None:
            return None
        with self._unrecorded():
            proxy: Any = tracked.proxy.force() if hasattr(tracked.proxy, "force") else tracked.proxy
        return proxy.node  # type: ignore[no-any-return]

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
        self._checks[call.node] = LeafCheck(name, structure, described)

    def _ask(self, tensor: torch.Tensor, symbolic: bool) -> Any:
        """What a tensor holds, on the traced batch; None where torch may answer, with symbols."""
        if not self._recording or not isinstance(tensor, FakeTensor):
            return None
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None or (self._prefix is None and symbolic):
            return None
        if not self.in_glue:
            return self._listed(slot.proxy.node, call_modules=False) if self._on_fakes else None
        if symbolic and self._symbolic_data:
            return None
        source = source_of_frame(sys._getframe(2))
        answer = self._listed(slot.proxy.node, call_modules=True)
        if answer is None:
            raise TraceError(
                f"the model branches on data that is not known while tracing: {tuple(tensor.shape)} {tensor.dtype}, "
                f"at {source}\n  The batch, or a module that it depends on, is on the meta device: "
                "trace the model with weights and a real batch."
            )
        self._guard(Known((slot.proxy.node,), source, answer))
        return answer

    def _listed(self, node: fx.Node, *, call_modules: bool) -> Any:
        if self._prefix is None:
            return None
        with self._unrecorded():
            return self._prefix.listed(node, call_modules=call_modules)

    @contextmanager
    def _post_dispatch_vmap(self) -> Iterator[None]:
        # operations under functorch transforms never reach a pre-dispatch mode: record these below the transform
        original = functorch_vmap.vmap_impl

        def vmap(*args: Any, **kwargs: Any) -> Any:
            if not self.in_glue:
                return original(*args, **kwargs)
            with disable_proxy_modes_tracing(), ProxyTorchDispatchMode(self._tracer, "symbolic", pre_dispatch=False):
                return original(*args, **kwargs)

        functorch_vmap.vmap_impl = functorch_apis.vmap_impl = vmap  # type: ignore[attr-defined]
        try:
            yield
        finally:
            functorch_vmap.vmap_impl = functorch_apis.vmap_impl = original  # type: ignore[attr-defined]


def _key(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path]
    return ".".join(parts)


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if not cleaned[0].isdigit() else f"_{cleaned}"
