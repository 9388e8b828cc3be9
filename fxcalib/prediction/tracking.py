"""Counts what operations on fake tensors would allocate, compute and read, as they happen."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_ATTENTION = "attention"


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the memory of every tensor that an operation makes, until that tensor is dropped.

    Only what operations return is seen: what a kernel allocates for itself is not. Sizes that depend on data (how many
    tokens an expert gets) count as `unknown`.
    """

    def __init__(self, unknown: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._unknown = unknown
        self._known: dict[int, int] = {}
        self.live = 0
        """Bytes of the tensors that were made inside and are still there."""
        self.peak = 0
        """The most that `live` has been since `restart`."""
        self.flops = 0
        """Floating-point operations of matrix products and attention, two for a multiply-add."""
        self.float32_flops = 0
        """Those of `flops` whose result is float32."""
        self.traffic = 0
        """Bytes read and written by all other operations but views."""

    def restart(self) -> None:
        """Forget peak and counts; what is live stays so."""
        self.peak, self.flops, self.float32_flops, self.traffic = self.live, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if made:
            fresh = [self._follow(tensor) for tensor in made]
            flops = self._flops_of(func, args, kwargs, result)
            self.flops += flops
            self.float32_flops += flops * (made[0].dtype == torch.float32)
            if not flops and (any(fresh) or func._schema.is_mutable):
                read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                self.traffic += sum(map(self._bytes, [*read, *made]))
        return result

    def _follow(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = self._number(storage.nbytes())
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)
        return True

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave the memory of `tensor`, which was there before, out of the count."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def _number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, self._unknown)))

    def _bytes(self, tensor: torch.Tensor) -> int:
        return math.prod(map(self._number, tensor.shape)) * tensor.element_size()

    def _flops_of(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        packet = func._overloadpacket
        name = packet.__name__
        if _ATTENTION in name:  # torch's own formula refuses grouped queries
            return self._attention_flops(args)
        formula = flop_registry.get(packet) or flop_registry.get(getattr(_aten, name.rstrip("_"), None))
        if formula is None:
            return 0
        try:
            return self._number(formula(*args, **kwargs, out_val=result))
        except (AttributeError, TypeError, ValueError):  # sizes that depend on data and do not compare
            return 0

    def _attention_flops(self, args: Any) -> int:
        """Two products of (queries, keys) for each head; the formula of torch's own attention operators."""
        query, key, value = args[:3]
        *batch, queries, width = map(self._number, query.shape)
        keys, value_width = self._number(key.shape[-2]), self._number(value.shape[-1])
        return int(2 * math.prod(batch) * queries * keys * (width + value_width))
