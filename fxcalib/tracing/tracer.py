"""Records the glue of a model's real `forward` on fake tensors, with every module below the glue as one opaque node.

The forward runs unchanged under a proxy dispatch mode. A call of a module that contains no target is recorded as ONE
`call_module` node on the live module; its fake result comes from running it on fakes with recording off. What is left
in the graph is what the ancestors of the targets do themselves, as ATen operations before dispatch.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxcalib.tracing.errors import TraceError, source_of_error, source_of_frame
from fxcalib.tracing.guards import Guard, InputSpec, LeafCheck, ShapeGuards, new_shape_env
from fxcalib.tracing.leaves import LeafCache
from fxcalib.tracing.preserve import fake_weights, intercepted_calls, preserved_state
from fxcalib.tracing.structure import PLAIN, flatten, is_native, is_symbolic, leaves_of, unflatten
from fxcalib.tracing.targets import Targets
from fxcalib.tracing.torch_private import (
    ConstantSource,
    DimDynamic,
    FakeTensor,
    FakeTensorMode,
    ProxyTorchDispatchMode,
    PythonKeyTracer,
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
from fxcalib.tracing.values import RealPrefix
from tracing_patches import active_patches


@dataclass
class ValueGuard:
    """A branch on data: `node` was `expected` on the traced batch."""

    node: fx.Node
    expected: bool
    guard: Guard


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


class GraphTracer(PythonKeyTracer):
    """Creates the nodes: weights become `get_attr` nodes of their path, other objects constants of the graph."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.record_stack_traces = False
        self.constants: dict[str, Any] = {}
        self.weights: dict[int, str] = {}
        self.existing: set[int] = set()
        self._objects: dict[int, tuple[object, fx.Node]] = {}
        self._literal = False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        self._literal = target is torch.ops.aten.lift_fresh_copy.default
        try:
            return super().create_proxy(kind, target, args, kwargs, *rest, **more)
        finally:
            self._literal = False

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        # the parent's version looks `get_attr` targets up with getattr, which fails on dotted paths
        node = fx.proxy.TracerBase.create_node(self, kind, target, args, kwargs, *rest, **more)
        if kind == "call_function":
            node.meta["source"] = source_of_frame(sys._getframe(1))
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self._tensor(a)
        if is_symbolic(a):
            return super().create_arg(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self.object_node(a)

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        path = self.weights.get(id(tensor))
        if path is None:
            if isinstance(tensor, FakeTensor):
                raise TraceError(f"a tensor of shape {tuple(tensor.shape)} was made where it could not be recorded")
            if tensor.numel() > 1 and not self._literal and id(tensor) not in self.existing:
                raise TraceError(
                    f"a real tensor of shape {tuple(tensor.shape)} that was made while tracing would be baked in"
                )
            path = self._constant(tensor)
            self.weights[id(tensor)] = path
        return self.create_node("get_attr", path, (), {})

    def _constant(self, value: object) -> str:
        path = f"_constant_{len(self.constants)}"
        self.constants[path] = value
        return path

    def object_node(self, value: object) -> fx.Node:
        """A node for an arbitrary object. Objects that calls may change (caches) are copied once per replay."""
        if id(value) in self._objects:
            return self._objects[id(value)][1]
        if is_mutable(value):
            held = pytree.tree_leaves(getattr(value, "__dict__", {}))
            if any(isinstance(x, FakeTensor) for x in held):
                raise TraceError(f"a {type(value).__name__} that already holds activations is passed to a module")
            path = self._constant(copy.deepcopy(value))
            node = self.create_node("call_function", copy.deepcopy, (self.create_node("get_attr", path, (), {}),), {})
        else:
            node = self.create_node("get_attr", self._constant(value), (), {})
        self._objects[id(value)] = (value, node)
        return node


def is_mutable(value: object) -> bool:
    """Whether module calls may change `value`: anything but modules, classes, functions and plain values."""
    return not isinstance(value, (nn.Module, type, pytree.TreeSpec, *PLAIN)) and not callable(value)


def has_effect(node: fx.Node) -> bool:
    """Whether running `node` does more than compute its value: module calls, in-place and random operations."""
    if node.op != "call_function":
        return node.op != "get_attr"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is copy.deepcopy  # a mutable object: every reader has to see the same copy
    assertion = target in (torch.ops.aten._assert_async.msg, torch.ops.aten._assert_scalar.default)
    return assertion or target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


class _Branches(TorchFunctionMode):
    """Answers `bool(tensor)` in the glue with the value on the real batch, and has it guarded."""

    def __init__(self, answer: Callable[[torch.Tensor], bool | None]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ or (func is torch.Tensor.item and args[0].dtype == torch.bool):
            answer = self._answer(args[0])
            if answer is not None:
                return answer
        return func(*args, **(kwargs or {}))


class Recorder:
    """Runs a model's forward once and records it."""

    def __init__(self, model: nn.Module, targets: Targets, device: torch.device) -> None:
        self._model, self._device = model, device
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, str] = {}
        for name, module in modules.items():
            self._names.setdefault(id(module), name)
        self._ancestors = {id(modules[name]) for name in targets.ancestors}
        self._tracer = GraphTracer(model)
        self._cache = LeafCache()
        self._env = new_shape_env()
        self._inside = 0
        self._recording = False
        self._checks: dict[fx.Node, LeafCheck] = {}
        self._values: list[ValueGuard] = []
        self._mutated: dict[fx.Node, list[fx.Node]] = {}
        self._prefix: RealPrefix | None = None

    @property
    def in_glue(self) -> bool:
        """Whether the code that runs now is recorded: the forward of an ancestor, not of an opaque module."""
        return self._recording and not self._inside

    def record(self, batch: Mapping[str, Any], dynamic: Callable[[str, int], bool]) -> Recording:
        """Run `model(**batch)` on fakes. `dynamic(name, dim)` says which dimensions of which input may vary."""
        tracer = self._tracer
        with patch_functorch_config(fake_tensor_propagate_real_tensors=False):
            mode = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True, shape_env=self._env)
        leaves, structure = flatten(dict(batch))
        paths = pytree.tree_flatten_with_path(dict(batch), is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))[0]
        names = tuple(_key(path) for path, _ in paths)
        fakes = [self._fake_input(mode, name, leaf, dynamic) for name, leaf in zip(names, leaves, strict=True)]
        placeholders: dict[fx.Node, Any] = {}
        tracked = []
        for name, leaf, fake in zip(names, leaves, fakes, strict=True):
            if isinstance(leaf, torch.Tensor):
                proxy = tracer.create_proxy("placeholder", _identifier(name), (), {})
                tracked.append((fake, proxy))
                # branches on data are answered on a copy: glue that writes in place must not change the batch
                placeholders[proxy.node] = leaf.to(self._device, copy=True) if leaf.device.type != "meta" else None
        real = {node: value for node, value in placeholders.items() if value is not None}
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.no_grad())
            stack.enter_context(preserved_state(self._model))
            tracer.existing = {id(t) for m in self._model.modules() for t in _plain_tensors(m)}
            attributes = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
            if len(real) == len(placeholders):
                self._prefix = RealPrefix(tracer.graph, real, lambda path: self._attribute(path, attributes))
            stack.enter_context(patch_fx_config(backed_size_oblivious=True))
            stack.enter_context(patch_functorch_config(generate_fake_kernels_from_real_mismatches=True))
            tracer.weights = stack.enter_context(fake_weights(self._model, mode, self._device))
            stack.enter_context(self._post_dispatch_vmap())
            stack.enter_context(active_patches(self))
            stack.enter_context(intercepted_calls(self._call))
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
            stack.enter_context(_Branches(self._branch))
            self._recording = True
            result = self._forward(unflatten(structure, *fakes))
            results, outputs = flatten(result)
            tracer.create_node("output", "output", (tracer.create_arg([self._proxy(x) for x in results]),), {})
            self._recording = False
        guarded = {value.node for value in self._values}
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

    def _fake_input(self, mode: FakeTensorMode, name: str, leaf: Any, dynamic: Callable[[str, int], bool]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        sizes = [DimDynamic.DYNAMIC if dynamic(name, d) else DimDynamic.STATIC for d in range(leaf.ndim)]
        here = leaf.device == self._device
        return mode.from_tensor(
            leaf if here else torch.empty(leaf.shape, dtype=leaf.dtype, device=self._device),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
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
        if not self.in_glue or id(module) in self._ancestors or id(module) not in self._names:
            return original(module, *args, **kwargs)
        return self._leaf(original, module, args, kwargs)

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
            return self._cache.call(forward, module, a, k)

        module.__dict__["forward"] = once
        self._inside += 1
        try:
            with disable_proxy_modes_tracing(), self._env.suppress_guards(), self._env.ignore_fresh_unbacked_symbols():
                return original(module, *args, **kwargs)
        finally:
            self._inside -= 1
            restore()

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

    def _branch(self, tensor: torch.Tensor) -> bool | None:
        if not self.in_glue or not isinstance(tensor, FakeTensor):
            return None
        slot = get_proxy_slot(tensor, self._tracer, None)
        if slot is None:
            return None
        source = source_of_frame(sys._getframe(2))
        self._inside += 1
        try:
            with disable_proxy_modes_tracing():
                expected = self._prefix.truth(slot.proxy.node) if self._prefix is not None else None
        finally:
            self._inside -= 1
        if expected is None:
            raise TraceError(
                f"the model branches on data that is not known while tracing: {tuple(tensor.shape)} {tensor.dtype}, "
                f"at {source}\n  It depends on a module's result, or the batch is on the meta device: "
                "trace with a real batch."
            )
        text = f"{slot.proxy.node.name} is {expected}"
        self._values.append(ValueGuard(slot.proxy.node, expected, Guard("value", text, source)))
        return expected

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


def _plain_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(dict(module.__dict__)) if isinstance(v, torch.Tensor)]


def _key(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path]
    return ".".join(parts)


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if not cleaned[0].isdigit() else f"_{cleaned}"
