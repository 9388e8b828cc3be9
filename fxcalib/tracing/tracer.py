"""Records the glue of a model's real `forward` on fake tensors, with every module below the glue as one opaque node.

The forward runs unchanged under a proxy dispatch mode. A call of a module that contains no target is recorded as ONE
`call_module` node on the live module; its fake result comes from running it on fakes with recording off. What is left
in the graph is what the ancestors of the targets do themselves, as ATen operations before dispatch.
"""

from __future__ import annotations

import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import sympy
import torch
from torch import fx, nn

import tracing_patches
from fxcalib.tracing.errors import TraceError, source_of_frame
from fxcalib.tracing.failure import DATA_DEPENDENT_BRANCH, DATA_DEPENDENT_SIZE, trace_error
from fxcalib.tracing.graph import GraphTracer, has_effect, is_mutable
from fxcalib.tracing.guards import InputSpec, Known, LeafCheck, Relation, ShapeGuards, ValueGuard
from fxcalib.tracing.leaves import LeafCache
from fxcalib.tracing.patching import wrapped_functions
from fxcalib.tracing.preserve import FakeWeights, fake_weights, intercepted_calls, preserved_state, tensors_of
from fxcalib.tracing.questions import Questions
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
    unset_fake_temporarily,
)
from fxcalib.tracing.values import UNKNOWN, RealPrefix
from fxcalib.tracing.wrapped_calls import FunctionRun, sized_as_given


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
        self._function = ""
        self._on_fakes = 0
        self._told = 0
        """How often opaque modules were told what data is."""
        self._guesses = 0
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
        inputs = InputSpec(structure, names, tuple(fakes))
        placeholders: dict[fx.Node, Any] = {}
        tracked = []
        for name, leaf, fake in zip(names, leaves, fakes, strict=True):
            if isinstance(leaf, torch.Tensor):
                proxy = tracer.create_proxy("placeholder", _identifier(name), (), {})
                tracked.append((fake, proxy))
                placeholders[proxy.node] = leaf
        with ExitStack() as stack:
            stack.enter_context(_without_logs_of_failures())
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
            for patch in (*tracing_patches.PATCHES, *wrapped_functions()):
                stack.enter_context(patch.active(self))
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
            stack.enter_context(Questions(self._ask))
            self._recording = True
            self._env.oracle = self
            result = self._forward(unflatten(structure, *fakes), inputs)
            results, outputs = flatten(result)
            tracer.create_node("output", "output", (tracer.create_arg([self._proxy(x) for x in results]),), {})
            self._recording = False
        self._env.oracle = None
        guarded = {node for value in self._values for node in value.nodes}
        tracer.graph.eliminate_dead_code(lambda node: node in guarded or has_effect(node))
        guards = ShapeGuards(self._env, inputs)
        return Recording(
            tracer.graph, tracer.constants, inputs, outputs, guards, self._values, self._checks, self._mutated
        )

    def _forward(self, batch: dict[str, Any], inputs: InputSpec) -> Any:
        try:
            return self._model(**batch)
        except Exception as error:
            self._recording = False
            raise trace_error(self._model, error, self._names, partial(self._readable, inputs)) from error
        finally:
            self._recording = False

    def _readable(self, inputs: InputSpec, size: Any) -> sympy.Expr:
        def expression(size: Any) -> sympy.Expr:
            return self._env.replace(size.node.expr) if is_symbolic(size) else sympy.sympify(size)

        return expression(size).xreplace(inputs.symbols(expression))

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
        self._refuse_in_function(module)
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
                self._refuse_in_function(m)
                if not self.in_glue:
                    return f(*args, **kwargs)
                return self._leaf(lambda target, *a, **k: target.forward(*a, **k), m, args, kwargs)

            module.__dict__["forward"] = entered

    def _leaf(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self._names[id(module)]
        _, result = self._opaque("call_module", name, name, partial(self._run_on_fakes, original, module), args, kwargs)
        return result

    def _opaque(
        self, kind: str, target: Any, name: str, run: Callable[[Any, Any], Any], args: Any, kwargs: Any
    ) -> tuple[fx.Proxy, Any]:
        """One node for a call, whose fake result is `run(args, kwargs)`."""
        tracer = self._tracer
        leaves, structure = flatten((args, kwargs))
        proxies = [self._proxy(leaf) for leaf in leaves]
        if is_native(structure):
            proxy_args, proxy_kwargs = unflatten(structure, *proxies)
        else:
            spec = fx.Proxy(tracer.object_node(structure), tracer)
            pair: Any = tracer.create_proxy("call_function", unflatten, (spec, *proxies), {})
            proxy_args, proxy_kwargs = tuple(pair[0][i] for i in range(len(args))), {k: pair[1][k] for k in kwargs}
        call = tracer.create_proxy(kind, target, proxy_args, proxy_kwargs)
        versions = [(x, x._version) for x in leaves if isinstance(x, torch.Tensor)]
        result = run(args, kwargs)
        tracer.settle(leaves)
        written = [self._proxy(x).node for x, version in versions if x._version != version]
        if written:
            self._mutated[call.node] = written
        self._track(call, name, result)
        return call, result

    def call_function(self, function: FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a wrapped function as one node; where nothing is recorded, call it."""
        if not self.in_glue:
            return self._call_original(original, args, kwargs)
        self._function = name = f"{function.__module__}.{function.__qualname__}"
        run = FunctionRun(name, original, on_fakes=lambda: self._on_fakes > 0)
        try:
            call, result = self._opaque("call_function", function, name, partial(self._run_function, run), args, kwargs)
        finally:
            self._function = ""
        call.node.meta["wrapped"] = name
        leaves = flatten((args, kwargs))[0]
        if run.changed:
            changed = [self._proxy(leaves[i]).node for i in sorted(run.changed)]
            self._mutated[call.node] = list(dict.fromkeys([*self._mutated.get(call.node, []), *changed]))
        if run.stood_in and not sized_as_given(result, leaves) and not self._depends_on_modules(call.node):
            call.node.meta["look_first"] = True
        self._guard_numbers(call, run, result)
        return result

    def _run_function(self, run: FunctionRun, args: Any, kwargs: Any) -> Any:
        module = next((x for x in flatten((args, kwargs))[0] if isinstance(x, nn.Module)), None)
        with self._opaquely():
            return self._run_or_stand_in(run, module, args, kwargs, call_modules=True)

    def _call_original(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves = flatten((args, kwargs))[0]
        if any(isinstance(x, FakeTensor) for x in leaves) or not any(isinstance(x, nn.Module) for x in leaves):
            return original(*args, **kwargs)
        with self._weights.suspended():
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
            real = self._listed(node, call_modules=True)
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
            self._guard(Known((node,), source_of_frame(sys._getframe(2)), results[i]))

    def _refuse_in_function(self, module: nn.Module) -> None:
        if not self._function or id(module) not in self._names:
            return
        name = self._names[id(module)]
        what = "the sequential target" if name in self._targets else "the module"
        if name in self._targets or next(module.parameters(), None) is not None:
            raise TraceError(
                f"the wrapped function {self._function} calls {what} {name or type(module).__name__}, which would be "
                "hidden from calibration: wrap a smaller function, one that calls no module with weights",
                kind="module in a wrapped function",
            )

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
            return self._cache.call(partial(self._informed, forward, module), module, a, k, lambda: self._told)

        module.__dict__["forward"] = once
        try:
            with self._opaquely():
                return original(module, *args, **kwargs)
        finally:
            restore()

    def _informed(self, forward: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Run an opaque module on fakes. Where numbers had to be guessed, real ones among its arguments go first."""
        guesses = self._guesses
        result = self._run_or_stand_in(forward, module, args, kwargs)
        if self._guesses == guesses or not any(self._is_known(leaf) for leaf in flatten((args, kwargs))[0]):
            return result
        with suppress(Exception):
            return self._stand_in(forward, module, args, kwargs)
        return result

    def _is_known(self, leaf: Any) -> bool:
        return isinstance(leaf, FakeTensor) and not leaf.is_floating_point() and self._known(leaf) is not None

    def _stand_in(
        self, run: Callable[..., Any], module: nn.Module | None, args: Any, kwargs: Any, *, call_modules: bool = False
    ) -> Any:
        used: dict[fx.Node, torch.Tensor] = {}
        _refuse_objects(flatten((args, kwargs))[0])

        def known(tensor: torch.Tensor) -> torch.Tensor | None:
            value = self._known(tensor, call_modules=call_modules)
            if value is not None and not tensor.is_floating_point():
                slot: Any = get_proxy_slot(tensor, self._tracer, None)
                used[slot.proxy.node] = value
            return value

        with self._on_real_tensors():
            result, matched = run_on_stand_ins(
                run, module, args, kwargs, sizes=self._env, known=known, originals=self._weights.originals
            )
        _refuse_objects(flatten(result)[0])
        if not matched:  # a size of the result follows from no other: it hangs on the data
            for node, value in used.items():
                with unset_fake_temporarily():
                    listed = value.tolist()
                self._tell(node, listed)
        return result

    def _tell(self, node: fx.Node, answer: Any) -> None:
        """An opaque module was told what `node` is: its result may hang on it, so that batches have to be alike."""
        self._told += 1
        if not any(isinstance(guard, Known) and guard.nodes == (node,) for guard in self._values):
            self._guard(Known((node,), source_of_frame(sys._getframe(1)), answer))

    def _run_or_stand_in(
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
                raise (again if isinstance(again, TraceError) and self._function else error) from None

    def _known(self, tensor: torch.Tensor, *, call_modules: bool = False) -> torch.Tensor | None:
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None or self._prefix is None:
            return None
        value = self._prefix.value(slot.proxy.node, call_modules=call_modules)
        return value if isinstance(value, torch.Tensor) else None

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        self._inside += 1
        try:
            with disable_proxy_modes_tracing():
                yield
        finally:
            self._inside -= 1

    @contextmanager
    def _opaquely(self) -> Iterator[None]:
        """Code that runs on fakes for the metadata of its result alone."""
        with self._unrecorded(), self._env.suppress_guards(), self._env.ignore_fresh_unbacked_symbols():
            self._on_fakes += 1
            try:
                yield
            finally:
                self._on_fakes -= 1

    @contextmanager
    def _on_real_tensors(self) -> Iterator[None]:
        """Code that runs on real tensors, also within some that runs on fakes."""
        on_fakes, self._on_fakes = self._on_fakes, 0
        try:
            yield
        finally:
            self._on_fakes = on_fakes

    def _run_really(self, name: str, args: Any, kwargs: Any) -> Any:
        """The result of a module on real values; `UNKNOWN` where it has no weights."""
        module = self._model.get_submodule(name)
        with self._on_real_tensors(), self._weights.suspended():
            if any(weight.is_meta for weight in module.parameters()):
                return UNKNOWN
            return call_module(module, args, kwargs, self._device)

    def value_of(self, symbol: sympy.Symbol) -> int | float | None:
        """What a symbol that depends on data is on the traced batch. In opaque modules, where only sizes count, 1."""
        node = self._node_of(symbol)
        value = None if node is None else self._listed(node, call_modules=True)
        if value is None and self._inside:
            self._guesses += symbol not in self._env.size_like  # how many there are of something is of no interest
            return 1
        return value

    def assumed(self, fact: sympy.Basic) -> None:
        """Keep what the trace goes on with as a guard. In opaque modules it is no assumption: replay runs them."""
        if not self.in_glue:
            return
        fact = self._env.replace(fact)
        symbols = tuple(sorted(fact.free_symbols, key=str))
        nodes = [self._node_of(symbol) for symbol in symbols]
        known = tuple(node for node in nodes if node is not None)
        if len(known) < len(nodes):
            raise TraceError(
                f"the model assumes {fact}, which cannot be held against other batches", kind=DATA_DEPENDENT_SIZE
            )
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
            answer = self._listed(slot.proxy.node, call_modules=False) if self._on_fakes else None
            if answer is not None:
                self._tell(slot.proxy.node, answer)
            return answer
        if symbolic and self._symbolic_data:
            return None
        source = source_of_frame(sys._getframe(2))
        answer = self._listed(slot.proxy.node, call_modules=True)
        if answer is None:
            raise TraceError(
                f"the model branches on data that is not known while tracing: {tuple(tensor.shape)} {tensor.dtype}, "
                f"at {source}\n  The batch, or a module that it depends on, is on the meta device: "
                "trace the model with weights and a real batch.",
                kind=DATA_DEPENDENT_BRANCH,
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


@contextmanager
def _without_logs_of_failures() -> Iterator[None]:
    """Torch logs every operation that fails on fakes, with its stack, also where something else is tried instead."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_objects(leaves: list[Any]) -> None:
    """A run on stand-ins would leave real tensors in objects, which the trace would go on with."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and not is_symbolic(leaf) and is_mutable(leaf):
            raise TraceError(f"a {type(leaf).__name__} cannot take part in a run on stand-ins", kind="mutated object")


def _key(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path]
    return ".".join(parts)


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if not cleaned[0].isdigit() else f"_{cleaned}"
