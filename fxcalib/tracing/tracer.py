"""Records the glue of a model's real `forward` on fake tensors, with every module below the glue as one opaque node.

The forward runs unchanged under a proxy dispatch mode. A call of a module that contains no target is recorded as ONE
`call_module` node on the live module; its fake result comes from running it on fakes with recording off. What is left
in the graph is what the ancestors of the targets do themselves, as ATen operations before dispatch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx, nn

import tracing_patches
from fxcalib.tracing.answers import Answers
from fxcalib.tracing.errors import TraceError
from fxcalib.tracing.failure import trace_error
from fxcalib.tracing.graph import GraphTracer, has_effect
from fxcalib.tracing.guards import InputSpec, LeafCheck, ShapeGuards, ValueGuard
from fxcalib.tracing.interception import Interception
from fxcalib.tracing.modes import Modes
from fxcalib.tracing.opaque import OpaqueCode
from fxcalib.tracing.patching import wrapped_functions
from fxcalib.tracing.preserve import (
    fake_weights,
    intercepted_assignments,
    intercepted_calls,
    preserved_attributes,
    preserved_state,
    saved_tensors,
    tensors_of,
)
from fxcalib.tracing.questions import Questions
from fxcalib.tracing.second_run import Numbering, Run, SecondRun, refusal
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.state import GlueState
from fxcalib.tracing.structure import (
    flatten,
    flatten_batch,
    is_symbolic,
    path_name,
    paths_of,
    unflatten,
)
from fxcalib.tracing.targets import Targets
from fxcalib.tracing.torch_private import (
    ConstantSource,
    DimDynamic,
    FakeTensorMode,
    ProxyTorchDispatchMode,
    StatelessSymbolicContext,
    disable_autocast_cache,
    disable_proxy_modes_tracing,
    enable_python_dispatcher,
    functorch_apis,
    functorch_vmap,
    patch_functorch_config,
    patch_fx_config,
    pytree,
    track_tensor_tree,
)
from fxcalib.tracing.values import RealPrefix


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
    """Calls that change arguments or buffers of the module in place -> the nodes of these."""


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
        self._symbolic_ones = symbolic_ones
        self.again = partial(Recorder, model, targets, device, symbolic_data=symbolic_data, symbolic_ones=symbolic_ones)
        """Makes another recorder like this one."""
        modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, str] = {}
        for name, module in modules.items():
            self._names.setdefault(id(module), name)
        self._tracer = GraphTracer(model)
        self._env = Sizes()
        self._modes = Modes(self._env)
        self._mutated: dict[fx.Node, list[fx.Node]] = {}
        self._answers = Answers(self._tracer, self._env, self._modes, self._mutated, symbolic_data=symbolic_data)
        self._code = OpaqueCode(model, self._names, device, self._tracer, self._env, self._modes, self._answers)
        glue = {name: modules[name] for name in targets.ancestors}
        above = set(map(id, glue.values()))
        self.state = GlueState(glue, {name: module for name, module in modules.items() if id(module) not in above})
        recording = (self._tracer, self._modes, self._answers, self._code, self.state, self._mutated)
        self._interception = Interception(model, self._names, targets, *recording)

    @property
    def asked_data(self) -> bool:
        """Whether the model has asked for numbers that depend on data."""
        return len(self._env.var_to_range) > len(self._env.backed_var_to_val)

    def record(self, batch: Mapping[str, Any]) -> Recording:
        """Run `model(**batch)` on fakes, all sizes of whose tensors are symbols."""
        with self._prepared(batch) as (inputs,):
            outputs, _ = self._run(inputs)
        graph = self._tracer.graph
        named = {node for value in self._answers.guards for node in value.nodes}
        named |= {node for written in self._mutated.values() for node in written}
        graph.eliminate_dead_code(lambda node: node in named or has_effect(node))
        guards, constants = ShapeGuards(self._env, inputs), self._tracer.constants
        checks = self._interception.checks
        return Recording(graph, constants, inputs, outputs, guards, self._answers.guards, checks, self._mutated)

    def check_state(self, batch: Mapping[str, Any]) -> None:
        """Run `model(**batch)` once and again, and raise TraceError where the second run is another program."""
        runs: list[Run] = []
        with self._prepared(batch, runs=3) as (learning, *given):
            with preserved_attributes(dict(self._model.named_modules())):
                # sizes that it finds to be certain numbers are so from the start
                runs.append(self._run_again(learning))
            self.state.begin()
            for inputs in given:
                try:
                    runs.append(self._run_again(inputs))
                except TraceError as error:  # only the state is another than when the model was recorded
                    raise refusal(self._model, self.state.changes().values(), self.state) from error
                self.state.know_numbers(self._env)
            numbering = Numbering(self._tracer, self._mutated, [run.output for run in runs])
            SecondRun(runs, self._answers.guards, numbering, self.state).check(self._model)

    def _run_again(self, inputs: InputSpec) -> Run:
        outputs, node = self._run(inputs)
        self._tracer.forget()
        return Run(node, str(outputs), len(self._answers.guards))

    @contextmanager
    def _prepared(self, batch: Mapping[str, Any], runs: int = 1) -> Iterator[list[InputSpec]]:
        """Everything is in place to run the forward; yields its inputs, as often as it will run."""
        tracer = self._tracer
        with patch_functorch_config(fake_tensor_propagate_real_tensors=False):
            mode = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True, shape_env=self._env)
        mode.cache_enabled = False  # what was found in an opaque module has made no guards for the glue
        leaves, structure = flatten_batch(batch)
        names = tuple(map(path_name, paths_of(batch)))
        fakes = tuple(self._fake_input(mode, name, leaf) for name, leaf in zip(names, leaves, strict=True))
        given = [InputSpec(structure, names, fakes if i == 0 else _same_sizes(mode, fakes)) for i in range(runs)]
        placeholders: dict[fx.Node, Any] = {}
        tracked = []
        for inputs in given:
            for name, leaf, fake in zip(names, leaves, inputs.values, strict=True):
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
            self._code.saved = stack.enter_context(saved_tensors())
            tracer.existing = {id(t) for t in tensors_of(self._model)}
            attributes = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
            if all(leaf.device.type != "meta" for leaf in placeholders.values()):
                self._answers.prefix = RealPrefix(
                    tracer.graph,
                    # a copy: glue that writes in place must not change the batch
                    lambda: {node: leaf.to(self._device, copy=True) for node, leaf in placeholders.items()},
                    lambda path: self._attribute(path, attributes),
                    self._code.run_really,
                    self._mutated,
                    self._code.saved,
                )
            stack.enter_context(patch_fx_config(backed_size_oblivious=True))
            stack.enter_context(patch_functorch_config(generate_fake_kernels_from_real_mismatches=True))
            self._code.weights = stack.enter_context(fake_weights(self._model, mode, self._device))
            tracer.weights = dict(self._code.weights.paths)
            stack.enter_context(self._post_dispatch_vmap())
            for patch in (*tracing_patches.PATCHES, *wrapped_functions()):
                stack.enter_context(patch.active(self._interception))
            stack.enter_context(intercepted_calls(self._interception.call))
            stack.enter_context(intercepted_assignments(self._interception.assign))
            self._interception.intercept_forwards()
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
            stack.enter_context(Questions(self._answers.ask))
            self._env.oracle = self._answers
            self.state.begin()
            yield given
        self._env.oracle = None

    def _run(self, inputs: InputSpec) -> tuple[pytree.TreeSpec, fx.Node]:
        """Record the forward; the structure of its result and the output node."""
        tracer = self._tracer
        self._modes.recording = True
        results, outputs = flatten(self._forward(unflatten(inputs.structure, *inputs.values), inputs))
        leaves = tracer.create_arg([self._interception.proxy(x) for x in results])
        node = tracer.create_node("output", "output", (leaves,), {})
        self.state.end()
        return outputs, node

    def _forward(self, batch: dict[str, Any], inputs: InputSpec) -> Any:
        try:
            return self._model(**batch)
        except Exception as error:
            self._modes.recording = False
            raise trace_error(self._model, error, self._names, partial(self._readable, inputs)) from error
        finally:
            self._modes.recording = False

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
        value = self._tracer.constants[path] if path in self._tracer.constants else attributes[path]
        return value.to(self._device) if isinstance(value, torch.Tensor) and not value.is_meta else value

    @contextmanager
    def _post_dispatch_vmap(self) -> Iterator[None]:
        # operations under functorch transforms never reach a pre-dispatch mode: record these below the transform
        original = functorch_vmap.vmap_impl

        def vmap(*args: Any, **kwargs: Any) -> Any:
            if not self._modes.in_glue:
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


def _same_sizes(mode: FakeTensorMode, fakes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other fakes of the same symbolic sizes."""
    with mode:
        return tuple(
            torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
            if isinstance(fake, torch.Tensor)
            else fake
            for fake in fakes
        )


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if not cleaned[0].isdigit() else f"_{cleaned}"
