"""How an opaque module gets its fake results: from a run on fakes, once per class, arguments and parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcalib.tracing.structure import PLAIN, flatten, is_symbolic, unflatten
from fxcalib.tracing.torch_private import free_unbacked_symbols

_INDEX = re.compile(r"(^|_)(i|id|idx|index|layer|number)$")
"""Names of attributes that hold which layer it is: a layer is like the next one all the same."""


class LeafCache:
    """Fake results of module calls that differ in nothing a result's metadata can depend on."""

    def __init__(self) -> None:
        self._reprs: dict[int, str] = {}
        self._results: dict[tuple[Any, ...], tuple[Any, list[tuple[Any, ...]]]] = {}

    def call(
        self, run: Callable[..., Any], module: nn.Module, name: str, args: Any, kwargs: Any, told: Callable[[], int]
    ) -> Any:
        """The result of `run(*args, **kwargs)`, the forward of `module` on fakes.

        It is kept for the next call unless `told()`, which counts what modules were told of data, grows meanwhile.
        """
        leaves, structure = flatten((args, kwargs))
        described = [_describe(leaf) for leaf in leaves]
        if any(d is None for d in described):  # an object that the call may change: it has to run
            return run(*args, **kwargs)
        like = (type(module), self._repr(module), _parameters(module), _settings(module, name))
        key = (*like, str(structure), tuple(described))
        if key in self._results:
            spec, templates = self._results[key]
            return unflatten(spec, *[_instantiate(template, leaves) for template in templates])
        versions = [(x, x._version) for x in (*leaves, *module.buffers()) if isinstance(x, torch.Tensor)]
        before = told()
        result = run(*args, **kwargs)
        unchanged = all(tensor._version == version for tensor, version in versions)
        results, spec = flatten(result)
        made = [_template(value, leaves) for value in results]
        known = [template for template in made if template is not None]
        if unchanged and len(known) == len(made) and told() == before:
            self._results[key] = (spec, known)
        return result

    def _repr(self, module: nn.Module) -> str:
        if id(module) not in self._reprs:  # taken once: a module may change its own repr while it runs
            try:
                self._reprs[id(module)] = repr(module)
            except Exception:  # some print their weights, which fakes cannot: such a module is like no other
                self._reprs[id(module)] = str(id(module))
        return self._reprs[id(module)]


def _parameters(module: nn.Module) -> tuple[Any, ...]:
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
    return (*parameters, *((name, tuple(b.shape), b.dtype) for name, b in module.named_buffers()))


def _settings(module: nn.Module, name: str) -> tuple[Any, ...]:
    """The numbers, strings, flags and tensors that a module and those in it hold, but for its own index."""
    index = {int(part) for part in name.split(".") if part.isdecimal()}
    held = (
        (inner, key, "index" if type(value) is int and value in index and _INDEX.search(key) else str(_describe(value)))
        for inner, module in module.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (*PLAIN, torch.Tensor))
    )
    return tuple(held)


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype, str(leaf.device), leaf.storage_offset() == 0)
    if is_symbolic(leaf):
        return str(leaf.node.expr)
    if isinstance(leaf, PLAIN):
        return (type(leaf).__name__, repr(leaf))
    return None


def _template(value: Any, leaves: list[Any]) -> tuple[Any, ...] | None:
    if isinstance(value, torch.Tensor):
        for index, leaf in enumerate(leaves):
            if leaf is value:
                return ("argument", index)
        storage = value.untyped_storage()._cdata
        if any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage for x in leaves):
            return None  # a view of an argument: the alias would be lost
        if any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in value.shape):
            return None
        return ("tensor", tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
    return ("plain", value) if isinstance(value, PLAIN) else None


def _instantiate(template: tuple[Any, ...], leaves: list[Any]) -> Any:
    if template[0] == "argument":
        return leaves[template[1]]
    if template[0] == "tensor":
        _, shape, stride, dtype, device = template
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return template[1]
