"""Sizes of a trace: symbols for the dimensions of a batch, and for what depends on data, asked for only when needed."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import sympy

from fxcalib.tracing.errors import source_of_frame
from fxcalib.tracing.torch_private import GuardOnDataDependentSymNode, ShapeEnv


class Oracle(Protocol):
    """Knows what a symbol that depends on data is on the traced batch."""

    def value_of(self, symbol: sympy.Symbol) -> int | float | None:
        """The value of a symbol that depends on data; None where nobody knows."""

    def assumed(self, fact: sympy.Basic) -> None:
        """Be told of a relation that holds on the traced batch and that the trace goes on with."""


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


class Sizes(ShapeEnv):
    """A shape environment in which sizes 0 and 1 are not special and equal sizes are not taken for the same size.

    Where the model asks for a relation of symbols that depend on data, the oracle is asked for their values; what the
    trace then goes on with is told to it.
    """

    def __init__(self) -> None:
        super().__init__(
            allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True, duck_shape=False, specialize_zero_one=False
        )
        self.guards = SourcedGuards()
        self.oracle: Oracle | None = None

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        while True:
            try:
                return super().evaluate_expr(orig_expr, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                if not self._learn(orig_expr):
                    raise

    def guard_or_defer_runtime_assert(  # type: ignore[override]  # torch wraps it in a cache
        self, orig_expr: Any, msg: str, fx_node: Any = None
    ) -> bool:
        oracle = self.__dict__.get("oracle")
        if oracle is not None and msg.startswith("propagate_real_tensors"):
            oracle.assumed(orig_expr)
        try:
            return bool(super().guard_or_defer_runtime_assert(orig_expr, msg, fx_node))
        except AssertionError:  # torch cannot always merge the ranges of two symbols that are said to be equal
            return True

    def _log_real_tensor_propagation(self, orig_expr: sympy.Basic, unsound_result: sympy.Basic) -> None:
        """Say nothing: what is assumed is a guard."""

    def known(self, expression: sympy.Basic) -> Any:
        """The number that `expression` is on the traced batch; None where it holds a symbol that nobody knows."""
        numbers = {**self.backed_var_to_val, **self.real_tensor_prop_unbacked_vals}
        value = self.replace(expression).xreplace(numbers)
        if not value.is_number and self._learn(value):
            value = value.xreplace(self.real_tensor_prop_unbacked_vals)
        if not value.is_number:
            return None
        return int(value) if value.is_integer else float(value)

    def _learn(self, expression: sympy.Basic) -> bool:
        """Ask for all symbols of `expression` that have no value yet; whether there were any and all are known now."""
        known = self.backed_var_to_val.keys() | self.real_tensor_prop_unbacked_vals.keys()
        asked = sorted(expression.free_symbols - known, key=str)
        if not asked or self.oracle is None:
            return False
        for symbol in asked:
            value = self.oracle.value_of(symbol)
            if value is None:
                return False
            self.set_real_tensor_prop_unbacked_vals(symbol, value)
        return True
