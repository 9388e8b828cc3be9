"""What a trace assumes of a batch, and how a batch is held against it.

Three kinds. *Shape guards* are relations between symbolic sizes; they are checked with numbers before anything runs.
*Value guards* are branches that the model took on data (is anything padded?): the part of the graph that leads to each
is kept as a program of its own and run on every batch beforehand. *Structure checks* hold every module's result against
what it looked like when traced, while it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fxcalib.tracing.errors import GuardError, source_of_frame
from fxcalib.tracing.structure import flatten
from fxcalib.tracing.torch_private import ShapeEnv, pytree


@dataclass(frozen=True)
class Guard:
    """One assumption of a trace, with the model's line that made it."""

    kind: str
    """`shape`, `value` or `constant`."""
    text: str
    source: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.text}  ({self.source})"


class SourcedGuards(list[Any]):
    """The guard list of a `ShapeEnv`, remembering for each guard the model's line that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def append(self, guard: Any) -> None:
        super().append(guard)
        self.sources.append(source_of_frame(sys._getframe(1)))

    def copy(self) -> SourcedGuards:
        twin = SourcedGuards()
        list.extend(twin, self)
        twin.sources = list(self.sources)
        return twin


def new_shape_env() -> ShapeEnv:
    """A shape environment in which sizes 0 and 1 are not special and equal sizes are not taken for the same size."""
    env = ShapeEnv(
        allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True, duck_shape=False, specialize_zero_one=False
    )
    env.guards = SourcedGuards()
    return env


@dataclass(frozen=True)
class InputSpec:
    """Structure and symbolic metadata of a batch."""

    structure: pytree.TreeSpec
    names: tuple[str, ...]
    """Readable path of each leaf, such as `input_ids`."""
    values: tuple[Any, ...]
    """Each leaf as traced: a fake tensor with symbolic sizes, or the constant that was baked in."""


@dataclass(frozen=True)
class LeafCheck:
    """What a module's result looked like when traced."""

    module: str
    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """(sizes, dtype) for tensors, None for other values."""


class ShapeGuards:
    """Checks sizes of batches and of module results against the symbolic sizes of a trace."""

    def __init__(self, env: ShapeEnv, inputs: InputSpec) -> None:
        self._inputs = inputs
        self._replacements = {s: env.replace(s) for s in self._symbols()}
        assert isinstance(env.guards, SourcedGuards)
        self._guards = [(guard.expr, source) for guard, source in zip(env.guards, env.guards.sources, strict=True)]
        self._replace = env.replace
        self._names = self._readable()
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
        readable = self._names
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
        leaves, structure = flatten(dict(batch))
        if structure != self._inputs.structure:
            raise GuardError(f"the batch has another structure than the traced one: keys {sorted(batch)}")
        for name, traced, leaf in zip(self._inputs.names, self._inputs.values, leaves, strict=True):
            if isinstance(traced, torch.Tensor) != isinstance(leaf, torch.Tensor):
                raise GuardError(f"batch[{name!r}] was traced as {type(traced).__name__}, not {type(leaf).__name__}")
            if not isinstance(traced, torch.Tensor):
                if traced != leaf:
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
                    f"the trace assumes {symbol.xreplace(self._names)} == {replacement.xreplace(self._names)}; "
                    f"the batch has {sizes[symbol]}"
                )
        for expr, source in self._guards:
            held = expr.xreplace(numbers)
            if held == sympy.false or (getattr(held, "is_number", False) and not held):
                assumed = expr.xreplace(self._names)
                raise GuardError(f"the trace assumes {assumed}, made at {source}; the batch has {signature}")
        return sizes

    def simplify(self, size: torch.SymInt) -> sympy.Expr:
        """The expression of a symbolic size after all unifications of the trace."""
        return self._replace(size.node._expr)

    def number(self, size: torch.SymInt, signature: tuple[Any, ...]) -> int:
        """The value of a symbolic size for a batch of this accepted signature.

        Raises:
            GuardError: the size depends on more than the sizes of the batch.
        """
        numbers = {symbol: sympy.Integer(n) for symbol, n in self._accepted[signature].items()}
        value = self._replace(size.node._expr).xreplace(numbers)
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
            matches = leaf.dtype == dtype and leaf.ndim == len(shape)
            if not matches or any(want not in (None, have) for want, have in zip(shape, leaf.shape, strict=True)):
                raise GuardError(
                    f"{check.module} returned {tuple(leaf.shape)} {leaf.dtype}; the trace expects {shape} {dtype}"
                )

    def _numbers(self, leaf: Any, signature: tuple[Any, ...]) -> Any:
        if leaf is None:
            return None
        shape, dtype = leaf
        numbers = {symbol: sympy.Integer(n) for symbol, n in self._accepted[signature].items()}
        known: list[int | None] = []
        for size in shape:
            if isinstance(size, torch.SymInt):
                value = self._replace(size.node._expr).xreplace(numbers)
                known.append(int(value) if value.is_number else None)
            else:
                known.append(int(size))
        return tuple(known), dtype
