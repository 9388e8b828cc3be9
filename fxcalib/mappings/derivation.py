"""Which module's output channels feed which linear modules, read off the trace of the model.

The model is traced once on fakes with its linear modules and norms as nodes. Labels (see `values`) start at the output
of each of them that can be scaled, and are followed to the parameters that are contracted with them. Channels of which
every reader is known, and on whose way nothing but operations that commute with a positive factor lies, make a mapping.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from fxcalib.mappings import rules
from fxcalib.mappings.gains import Gain, gain_of, may_be_gain
from fxcalib.mappings.mapping import ChannelMapping, Reader
from fxcalib.mappings.opaque import Leaf, run_labelled
from fxcalib.mappings.values import NO_LABEL, Ledger, Read, Value, WeightView
from fxcalib.tracing import TracedModel, TraceError, trace

# Number of tokens a stand-in has along each symbolic size: enough, at the first or second try, for every expert.
_STAND_IN_SIZES = (32, 64)


@dataclass(frozen=True)
class Derivation:
    """The mappings of a model."""

    mappings: tuple[ChannelMapping, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Norm that cannot be scaled, although linear modules read it -> why."""


def derive(model: nn.Module, batch: Mapping[str, Any], device: torch.device | None = None) -> Derivation:
    """The mappings of `model`, as `model(**batch)` runs. No weight is read, unless the model asks for data that is
    computed with it; `model` may lie on the meta device.

    Raises:
        TraceError: the model cannot be traced.
    """
    kept_whole = _nested_lists(model)
    leaves = {
        name: module
        for name, module in model.named_modules()
        if (is_linear(module) or may_be_gain(module)) and name not in kept_whole and not _is_below(name, kept_whole)
    }
    try:
        traced = trace(model, batch, list(leaves), ignore=sorted(kept_whole), device=device)
    except TraceError as error:
        error.add_note("which modules can be smoothed was to be read off this trace; name them yourself with mappings=")
        raise
    return _Derivation(traced).result()


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b, by the forward of `nn.Linear` itself or one wrapped around that."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_below(name: str, above: set[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in above)


def _nested_lists(model: nn.Module) -> set[str]:
    """Modules that own a list of modules inside of a member of another list: experts.

    Which of them run depends on data, so a trace through them would hold for one batch.
    """
    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len({type(c) for c in m}) == 1}
    nested = {name for name in lists if len(model.get_submodule(name)) > 1 and _is_below(name, lists)}  # type: ignore[arg-type]
    return {name.rpartition(".")[0] for name in nested}


class _Derivation:
    def __init__(self, traced: TracedModel) -> None:
        self._traced, self._model = traced, traced.model
        self._modules = dict(self._model.named_modules())
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._ledger = Ledger()
        self._values: dict[fx.Node, Any] = {}
        self._gains: dict[str, Gain | None] = {}
        owners = Counter(id(p) for m in self._modules.values() for p in m.parameters(recurse=False))
        read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
        self._shared = {path for path, p in self._parameters.items() if owners[id(p)] > 1 or path in read}
        """Parameters on which more depends than the outputs of the module that has them."""

    def result(self) -> Derivation:
        for node in self._traced.graph.nodes:
            self._values[node] = self._visit(node)
        self._settle()
        return self._collected()

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._unknown(node)
        if node.op == "get_attr":
            return self._attribute(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._values[n])
        if node.op == "output":
            self._ledger.freeze(rules.values_in(args), "the result of the model")
            return None
        if node.op == "call_module":
            return self._called(node, str(node.target), args, kwargs)
        result = self._unknown(node)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][int(str(args[1]))]
        results, values = list(rules.values_in(result)), list(rules.values_in((args, kwargs)))
        if not isinstance(node.target, torch._ops.OpOverload) or not results:
            self._ledger.freeze(values, f"the operation {node.target}")
            return result
        name = str(node.target._schema.name).rpartition("::")[-1]
        if node.target._schema.is_mutable:
            if values and rules.keeps(name, args, kwargs):
                return result.with_labels(values[0].labels)
            self._ledger.freeze(values, f"the operation {name}")
            return result
        found = rules.apply(name, args, kwargs, [each.shape for each in results], self._ledger)
        return found if isinstance(result, (tuple, list)) else found[0]

    def _attribute(self, node: fx.Node) -> Any:
        tensor, path = node.meta.get("val"), str(node.target)
        if not isinstance(tensor, Tensor):
            return None
        owner = path.rpartition(".")[0]
        own = path in self._parameters and not self._is_leaf(owner)
        return Value(self._shape(tensor), None, WeightView(path, tuple(range(tensor.dim()))) if own else None)

    def _is_leaf(self, name: str) -> bool:
        return is_linear(self._modules[name]) or may_be_gain(self._modules[name])

    def _called(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
        result = self._unknown(node)
        leaf = self._leaf(name)
        if leaf is not None and len(args) == 1 and not kwargs and isinstance(result, Value):
            return result.with_labels(leaf(args[0]))
        values = list(rules.values_in((args, kwargs)))
        inner = {f"{name}.{path}": self._leaf(f"{name}.{path}") for path, _ in self._modules[name].named_modules()}
        leaves = {path: found for path, found in inner.items() if found is not None}
        if leaves or any(value.labels is not None for value in values):
            labels = self._look_into(node, name, leaves, values)
            if labels is not None and isinstance(result, Value):
                return result.with_labels(labels)
        return result

    def _leaf(self, name: str) -> Leaf | None:
        """How labels pass a linear module or a gain; None for other modules."""
        module = self._modules.get(name)
        if module is None:
            return None
        if is_linear(module):
            return partial(self._linear, name)
        if name not in self._gains:
            self._gains[name] = gain_of(module)
        return None if self._gains[name] is None else partial(self._scaled, name)

    def _linear(self, name: str, value: Value) -> Tensor | None:
        module = self._modules[name]
        assert isinstance(module, nn.Linear)
        if f"{name}.weight" in self._shared:
            self._ledger.freeze([value], f"{name}, whose weight is used elsewhere")
            return None
        labels = value.labels
        if labels is not None and any(value.varies(dim) for dim in range(labels.dim() - 1)):
            self._ledger.freeze([value], f"{name}, which reads other channels at other places")
            labels = None
        flat = None if labels is None else labels.reshape(-1)
        self._ledger.read(f"{name}.weight", 1, flat, module.in_features)
        return self._labels(name, module.out_features, len(value.shape))

    def _scaled(self, name: str, value: Value) -> Tensor | None:
        self._ledger.freeze([value], f"{name}, which normalizes")
        gain = self._gains[name]
        assert gain is not None
        return self._labels(name, gain.channels, len(value.shape))

    def _labels(self, name: str, channels: int, dims: int) -> Tensor | None:
        if any(f"{name}.{path}" in self._shared for path, _ in self._modules[name].named_parameters()):
            return None
        labels = self._ledger.labels_of(name, channels)
        return torch.arange(labels.start, labels.stop).reshape((1,) * (dims - 1) + (channels,))

    def _look_into(
        self, node: fx.Node, name: str, leaves: Mapping[str, Leaf], values: Sequence[Value]
    ) -> Tensor | None:
        """Labels of the result of a module that the trace kept whole; whatever goes wrong freezes all in it."""
        module = self._modules[name]
        reason = ""
        for size in _STAND_IN_SIZES if leaves else (2,):
            try:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), partial(self._stand_in, size))
                return run_labelled(module, name, args, kwargs, leaves, self._ledger)
            except Exception as error:  # it is the model's own code, on arguments of no meaning
                reason = f"{name}, which cannot be looked into: {error}"
        inside = [Value((), torch.arange(r.start, r.stop)) for n, r in self._ledger.sources.items() if n in leaves]
        self._ledger.freeze([*values, *inside], reason)
        return None

    def _stand_in(self, size: int, node: fx.Node) -> Any:
        """A pair of a small tensor and its labels in the place of a node's value, or a number."""
        fake, value = node.meta.get("val"), self._values[node]
        if isinstance(fake, Tensor) and isinstance(value, Value):
            shape = [self._number(each, size) for each in value.shape]
            if fake.is_floating_point():
                tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(fake.dtype)
            else:
                tensor = torch.full(shape, fake.dtype == torch.bool, dtype=fake.dtype)
            return tensor, value.labels
        if isinstance(fake, torch.SymInt):
            return self._number(self._traced.expression(fake), size)
        raise LookupError(f"it is called with {node}, which is no tensor")

    def _number(self, expression: Any, size: int) -> int:
        expression = sympy.sympify(expression)
        return int(expression.subs(dict.fromkeys(expression.free_symbols, size)))

    def _shape(self, tensor: Tensor) -> tuple[Any, ...]:
        return tuple(size if isinstance(size, int) else self._traced.expression(size) for size in tensor.shape)

    def _unknown(self, node: fx.Node) -> Any:
        """A node's result as nested values without labels; None for what is no tensor."""

        def known(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Value(self._shape(value))
            return [known(each) for each in value] if isinstance(value, (tuple, list)) else None

        return known(node.meta.get("val"))

    def _settle(self) -> None:
        """Freeze the channels of parameters that are read in more than one way."""
        for path, reads in self._ledger.reads.items():
            if len(reads) > 1 or path in self._ledger.spoiled:
                values = [Value((), read.labels) for read in reads]
                self._ledger.freeze(values, f"{path}, which is read in more than one way")

    def _collected(self) -> Derivation:
        ledger, frozen = self._ledger, self._ledger.frozen()
        names, starts = list(ledger.sources), torch.tensor([labels.start for labels in ledger.sources.values()])
        readers: dict[str, list[Reader]] = {name: [] for name in names}
        blocked: set[str] = set()
        for read in (read for reads in ledger.reads.values() for read in reads if read.labels is not None):
            assert read.labels is not None
            known = read.labels[read.labels != NO_LABEL]
            for number in torch.unique(torch.bucketize(known, starts, right=True) - 1).tolist():
                reader = self._reader(read, ledger.sources[names[number]], frozen)
                if reader is None:
                    blocked.add(names[number])
                else:
                    readers[names[number]].append(reader)
        found = (self._mapping(name, readers[name], frozen) for name in names if readers[name])
        left_out = {
            name: f"its channels go through {ledger.reason(ledger.sources[name].start)} as well"
            for name in names
            if name in blocked and not readers[name] and self._gains.get(name) is not None
        }
        return Derivation(tuple(found), left_out)

    def _reader(self, read: Read, labels: range, frozen: Tensor) -> Reader | None:
        """A parameter as a reader of the source with these labels; None where it reads frozen ones only."""
        assert read.labels is not None
        own = (read.labels >= labels.start) & (read.labels < labels.stop)
        own &= ~frozen[read.labels.clamp(min=0)]
        if not bool(own.any()):
            return None
        index = torch.where(own, read.labels - labels.start, NO_LABEL)
        every = range(len(labels))
        same = len(index) == len(labels) and torch.equal(index, torch.arange(len(labels)))
        module, _, parameter = read.path.rpartition(".")
        return Reader(module, parameter, read.axis, every if same else tuple(index.tolist()))

    def _mapping(self, source: str, readers: Sequence[Reader], frozen: Tensor) -> ChannelMapping:
        labels, gain = self._ledger.sources[source], self._gains.get(source)
        offsets = gain.offsets if gain is not None else {n: 0.0 for n, _ in self._modules[source].named_parameters()}
        kept = tuple(torch.nonzero(frozen[labels.start : labels.stop])[:, 0].tolist())
        return ChannelMapping(source, len(labels), offsets, tuple(readers), kept)
