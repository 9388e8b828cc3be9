"""What a trace assumes of a batch, and how a batch is held against it.

Three kinds. *Shape guards* are relations between symbolic sizes; they are checked with numbers before anything runs.
*Value guards* are branches that the model took on data (is anything padded?): the part of the graph that leads to each
is kept as a program of its own and run on every batch beforehand. *Structure checks* hold every module's result against
what it looked like when traced, while it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fxcalib.tracing.errors import GuardError
from fxcalib.tracing.sizes import Sizes, SourcedGuards
from fxcalib.tracing.structure import flatten, flatten_batch, same_constant
from fxcalib.tracing.torch_private import pytree


@dataclass(frozen=True)
class Guard:
    """One assumption of a trace, with the model's line that made it."""

    kind: str
    """`shape`, `value` or `constant`."""
    text: str
    source: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.text}  ({self.source})"


@dataclass(frozen=True)
class InputSpec:
    """Structure and symbolic metadata of a batch."""

    structure: pytree.TreeSpec
    names: tuple[str, ...]
    """Readable path of each leaf, such as `input_ids`."""
    values: tuple[Any, ...]
    """Each leaf as traced: a fake tensor with symbolic sizes, or the constant that was baked in."""

    def symbols(self, expression: Callable[[Any], sympy.Expr]) -> dict[sympy.Symbol, sympy.Symbol]:
        """Readable names of the symbolic sizes that `expression` gives for the sizes of the inputs.

        `batch` and `sequence` for the first input of two or more dimensions, else input and dimension.
        """
        named: dict[sympy.Symbol, sympy.Symbol] = {}
        taken: set[str] = set()
        for name, value in zip(self.names, self.values, strict=True):
            if not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                found = expression(size)
                if not isinstance(found, sympy.Symbol) or found in named:
                    continue
                wanted = ("batch", "sequence")[dim] if dim < 2 and value.ndim <= 2 else f"{name}_{dim}"
                label = wanted if wanted not in taken else f"{name}_{dim}"
                taken.add(label)
                named[found] = sympy.Symbol(label, positive=True, integer=True)
        return named


@dataclass(frozen=True)
class ValueGuard(ABC):
    """What the data of the traced batch was found to be, and that the trace goes on with."""

    nodes: tuple[fx.Node, ...]
    """The nodes of the graph that compute the values in question."""
    source: str
    """The model's line that asked."""
    after: fx.Node | None = field(default=None, kw_only=True)
    """The last operation before the question that wrote to the memory of these nodes."""

    @abstractmethod
    def holds(self, values: Sequence[Any]) -> bool:
        """Whether it is so for these values of the nodes."""

    @abstractmethod
    def text(self) -> str:
        """The assumption, in names of nodes."""

    def check(self, *values: Any) -> None:
        """Raise GuardError where it is not so; a node function of traced graphs.

        Guards that depend on a module's result are nodes as well: what a module returns changes while it is compressed.
        """
        if not self.holds(values):
            raise GuardError(
                f"the trace assumes that {self.text()}, made at {self.source}; with the weights as they are now, this "
                "batch takes another way. Calibrate with pipeline='layer_sequential' and suspended=True"
            )

    def listed(self) -> Guard:
        """The guard for people."""
        return Guard("value", self.text(), self.source)


@dataclass(frozen=True)
class Relation(ValueGuard):
    """A relation of numbers that depend on data."""

    fact: sympy.Basic
    symbols: tuple[sympy.Symbol, ...]
    """Of `fact`, one for each node."""

    def holds(self, values: Sequence[Any]) -> bool:
        numbers = (value.item() if isinstance(value, torch.Tensor) else value for value in values)
        return _is_true(self.fact.xreplace(dict(zip(self.symbols, map(sympy.sympify, numbers), strict=True))))

    def text(self) -> str:
        names = {symbol: sympy.Symbol(node.name) for symbol, node in zip(self.symbols, self.nodes, strict=True)}
        return str(self.fact.xreplace(names))


@dataclass(frozen=True)
class Known(ValueGuard):
    """The value of a tensor, as numbers in lists."""

    expected: Any

    def holds(self, values: Sequence[Any]) -> bool:
        found = values[0].tolist() if isinstance(values[0], torch.Tensor) else values[0]
        return bool(found == self.expected)

    def text(self) -> str:
        return f"{self.nodes[0].name} is {self.expected}"


def _is_true(relation: Any) -> bool:
    return bool(relation == sympy.true or (relation.is_number and relation != sympy.false and bool(relation)))


@dataclass(frozen=True)
class LeafCheck:
    """What a module's result looked like when traced."""

    module: str
    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """(sizes, dtype) for tensors, None for other values."""


class ShapeGuards:
    """Checks sizes of batches and of module results against the symbolic sizes of a trace."""

    def __init__(self, env: Sizes, inputs: InputSpec) -> None:
        self._inputs = inputs
        self._replacements = {s: env.replace(s) for s in self._symbols()}
        assert isinstance(env.guards, SourcedGuards)
        self._guards = [(guard.expr, source) for guard, source in zip(env.guards, env.guards.sources, strict=True)]
        self._replace = env.replace
        self.names = self._readable()
        """Symbol of a size -> the same with the name of its input and dimension."""
        self._accepted: dict[tuple[Any, ...], dict[sympy.Symbol, int]] = {}
        self._expected: dict[tuple[str, int, tuple[Any, ...]], list[Any]] = {}

    def _symbols(self) -> list[sympy.Symbol]:
        sizes: list[Any] = [s for v in self._inputs.values if isinstance(v, torch.Tensor) for s in v.shape]
        return [s.node._expr for s in sizes if isinstance(s, torch.SymInt) and s.node._expr.is_Symbol]

    def _readable(self) -> dict[sympy.Symbol, sympy.Symbol]:
        names: dict[sympy.Symbol, sympy.Symbol] = {}
        for name, value in zip(self._inputs.names, self._inputs.values, strict=True):
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node._expr.is_Symbol:
                    names.setdefault(size.node._expr, sympy.Symbol(f"{name}.shape[{dim}]"))
        return names

    def listed(self) -> list[Guard]:
        """All shape guards and baked constants, in the sizes of the inputs."""
        readable = self.names
        found = [Guard("shape", str(expr.xreplace(readable)), source) for expr, source in self._guards]
        equal = [(s.xreplace(readable), r.xreplace(readable)) for s, r in self._replacements.items() if s != r]
        found += [Guard("shape", f"{s} == {r}", "sizes unified while tracing") for s, r in equal]
        for name, value in zip(self._inputs.names, self._inputs.values, strict=True):
            if not isinstance(value, torch.Tensor):
                found.append(Guard("constant", f"{name} == {value!r}", "batch"))
        return found

    def bind(self, batch: Mapping[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
        """Leaves of `batch` and its signature (the sizes of all leaves).

        Raises:
            GuardError: structure, dtype, rank, a constant or a size relation differs from the trace.
        """
        leaves, structure = flatten_batch(batch)
        if structure != self._inputs.structure:
            raise GuardError(f"the batch has another structure than the traced one: keys {sorted(batch)}")
        for name, traced, leaf in zip(self._inputs.names, self._inputs.values, leaves, strict=True):
            if isinstance(traced, torch.Tensor) != isinstance(leaf, torch.Tensor):
                raise GuardError(f"batch[{name!r}] was traced as {type(traced).__name__}, not {type(leaf).__name__}")
            if not isinstance(traced, torch.Tensor):
                if not same_constant(traced, leaf):
                    raise GuardError(f"batch[{name!r}] was traced as {traced!r} and is {leaf!r}")
            elif traced.dtype != leaf.dtype or traced.ndim != leaf.ndim:
                raise GuardError(
                    f"batch[{name!r}] was traced as {traced.ndim}-D {traced.dtype}, not {leaf.ndim}-D {leaf.dtype}"
                )
        signature = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves)
        if signature not in self._accepted:
            self._accepted[signature] = self._solve(signature)
        return leaves, signature

    def _solve(self, signature: tuple[Any, ...]) -> dict[sympy.Symbol, int]:
        sizes: dict[sympy.Symbol, int] = {}
        for name, traced, shape in zip(self._inputs.names, self._inputs.values, signature, strict=True):
            if shape is None:
                continue
            for dim, (symbolic, actual) in enumerate(zip(traced.shape, shape, strict=True)):
                if isinstance(symbolic, torch.SymInt) and symbolic.node._expr.is_Symbol:
                    sizes.setdefault(symbolic.node._expr, actual)
                elif int(symbolic) != actual:
                    raise GuardError(f"batch[{name!r}].shape[{dim}] was traced as {symbolic} and is {actual}")
        numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        for symbol, replacement in self._replacements.items():
            value = replacement.xreplace(numbers)
            if value.is_number and int(value) != sizes[symbol]:
                raise GuardError(
                    f"the trace assumes {symbol.xreplace(self.names)} == {replacement.xreplace(self.names)}; "
                    f"the batch has {sizes[symbol]}"
                )
        for expr, source in self._guards:
            if not _is_true(expr.xreplace(numbers)):
                assumed = expr.xreplace(self.names)
                raise GuardError(f"the trace assumes {assumed}, made at {source}; the batch has {signature}")
        return sizes

    def simplify(self, size: torch.SymInt) -> sympy.Expr:
        """The expression of a symbolic size after all unifications of the trace."""
        return self._replace(size.node._expr)

    def numbers(self, signature: tuple[Any, ...]) -> Mapping[sympy.Symbol, sympy.Integer]:
        """The sizes of a batch of this accepted signature."""
        return {symbol: sympy.Integer(n) for symbol, n in self._accepted[signature].items()}

    def number(self, size: torch.SymInt, signature: tuple[Any, ...]) -> int:
        """The value of a symbolic size for a batch of this accepted signature.

        Raises:
            GuardError: the size depends on more than the sizes of the batch.
        """
        value = self._replace(size.node._expr).xreplace(dict(self.numbers(signature)))
        if not value.is_number:
            raise GuardError(f"the size {value} does not follow from those of the batch")
        return int(value)

    def check_leaf(self, check: LeafCheck, result: Any, signature: tuple[Any, ...]) -> None:
        """Hold a module's result against what was traced.

        Raises:
            GuardError: another structure, dtype, rank or size.
        """
        leaves, structure = flatten(result)
        if structure != check.structure:
            raise GuardError(f"{check.module} returned {structure}; when traced it returned {check.structure}")
        key = (check.module, id(check), signature)
        if key not in self._expected:
            self._expected[key] = [self._numbers(leaf, signature) for leaf in check.leaves]
        for leaf, expected in zip(leaves, self._expected[key], strict=True):
            if expected is None:
                continue
            shape, dtype = expected
            if not isinstance(leaf, torch.Tensor):
                raise GuardError(f"{check.module} returned {leaf!r} where the trace expects {shape} {dtype}")
            matches = leaf.dtype == dtype and leaf.ndim == len(shape)
            if not matches or any(want not in (None, have) for want, have in zip(shape, leaf.shape, strict=True)):
                raise GuardError(
                    f"{check.module} returned {tuple(leaf.shape)} {leaf.dtype}; the trace expects {shape} {dtype}"
                )

    def example(self, check: LeafCheck, signature: tuple[Any, ...], device: torch.device) -> Any:
        """Empty tensors of the dtypes and sizes that `check` expects, 1 where a size depends on data."""
        known = (self._numbers(leaf, signature) for leaf in check.leaves)
        made = (
            k and torch.empty([1 if size is None else size for size in k[0]], dtype=k[1], device=device) for k in known
        )
        return pytree.tree_unflatten(list(made), check.structure)

    def _numbers(self, leaf: Any, signature: tuple[Any, ...]) -> Any:
        if leaf is None:
            return None
        shape, dtype = leaf
        numbers = dict(self.numbers(signature))
        known: list[int | None] = []
        for size in shape:
            if isinstance(size, torch.SymInt):
                value = self._replace(size.node._expr).xreplace(numbers)
                known.append(int(value) if value.is_number else None)
            else:
                known.append(int(size))
        return tuple(known), dtype
