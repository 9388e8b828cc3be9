"""Runs a module that cannot run on fake tensors on small real tensors in their place, for the sizes of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcalib.tracing.errors import TraceError
from fxcalib.tracing.sizes import Sizes
from fxcalib.tracing.structure import flatten, is_symbolic, unflatten
from fxcalib.tracing.torch_private import DisablePythonDispatcher, FakeTensor, unset_fake_temporarily


def run_on_stand_ins(
    run: Callable[..., Any],
    module: nn.Module | None,
    args: Any,
    kwargs: Any,
    *,
    sizes: Sizes,
    known: Callable[[torch.Tensor], torch.Tensor | None],
    originals: Mapping[int, torch.Tensor],
) -> tuple[Any, bool]:
    """The result of `run(*args, **kwargs)` on fakes, found by running it on real tensors of the hinted sizes.

    Arguments that `known` knows are themselves, all others are noise (floating point), zero (integers) or true; weights
    take no memory. A size of the result is that of an argument which has the same number of elements there; replay
    holds every result against it. The second value tells whether each size was that of an argument or a weight.
    """
    leaves, structure = flatten((args, kwargs))
    with unset_fake_temporarily(), DisablePythonDispatcher(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        stand_ins = [_materialize(leaf, sizes, known) for leaf in leaves]
        real_args, real_kwargs = unflatten(structure, *stand_ins)
        try:
            with _stand_in_weights(module, originals, dense=False):
                real, spec = flatten(run(*real_args, **real_kwargs))
        except RuntimeError:  # some kernels want weights in order, such as grouped matrix products
            with _stand_in_weights(module, originals, dense=True):
                real, spec = flatten(run(*real_args, **real_kwargs))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, FakeTensor)), torch.device("cpu"))
    given = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
    aliased = [_alias(value, stand_ins, leaves) for value in real]
    made = [_fake(v, given, sizes, device) if a is None else a for v, a in zip(real, aliased, strict=True)]
    weights = module.parameters() if module is not None else ()
    fixed = {size for tensor in (*given, *weights) for size in tensor.shape if isinstance(size, int)}
    found = [size for value in made if isinstance(value, torch.Tensor) for size in value.shape]
    return unflatten(spec, *made), all(isinstance(size, torch.SymInt) or size in fixed for size in found)


def _materialize(leaf: Any, sizes: Sizes, known: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    if is_symbolic(leaf):
        value = sizes.known(leaf.node.expr)
        if value is None:
            raise TraceError(f"the size {leaf} is not known while tracing", kind="data-dependent size")
        return bool(value) if isinstance(leaf, torch.SymBool) else value
    if not isinstance(leaf, FakeTensor):
        return leaf
    value = known(leaf)
    if value is not None:
        return value.to("cpu", copy=True)
    shape = [_number(size, sizes) for size in leaf.shape]
    if leaf.is_floating_point():
        return torch.randn(shape).mul_(0.1).to(leaf.dtype)
    return torch.ones(shape, dtype=leaf.dtype) if leaf.dtype == torch.bool else torch.zeros(shape, dtype=leaf.dtype)


def _number(size: Any, sizes: Sizes) -> int:
    value = sizes.known(size.node.expr) if isinstance(size, torch.SymInt) else int(size)
    if value is None:
        raise TraceError(f"the size {size} is not known while tracing", kind="data-dependent size")
    return int(value)


@contextmanager
def _stand_in_weights(
    module: nn.Module | None, originals: Mapping[int, torch.Tensor], *, dense: bool
) -> Iterator[None]:
    """Real tensors in the place of fake weights: one number each, seen in the weight's shape unless `dense`.

    Buffers are themselves.
    """
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for owner in module.modules() if module is not None else ():
        groups: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for group in groups:
            for key, tensor in group.items():
                if isinstance(tensor, FakeTensor):
                    replaced.append((group, key, tensor))
    made: dict[int, torch.Tensor] = {}
    for group, key, tensor in replaced:
        if id(tensor) not in made:
            real = originals.get(id(tensor))
            small = torch.full((), 0.01).to(tensor.dtype).expand(tuple(tensor.shape))
            small = small.contiguous() if dense else small
            unread = real is None or real.is_meta or isinstance(real, nn.Parameter)
            made[id(tensor)] = small if real is None or unread else real.cpu()
        group[key] = made[id(tensor)]
    try:
        yield
    finally:
        for group, key, tensor in replaced:
            group[key] = tensor


def _alias(value: Any, stand_ins: list[Any], leaves: list[Any]) -> Any:
    """The argument that `value` is, or whose memory it is; None for what is new."""
    for real, leaf in zip(stand_ins, leaves, strict=True):
        if not isinstance(value, torch.Tensor) or not isinstance(real, torch.Tensor) or not value.numel():
            continue
        if value is real:
            return leaf
        same = value.data_ptr() == real.data_ptr() and (value.shape, value.dtype) == (real.shape, real.dtype)
        if same and value.stride() == real.stride():
            return leaf.detach()
    return None


def _fake(value: Any, given: list[FakeTensor], sizes: Sizes, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = [_symbolic(n, d, value.ndim, given, sizes) for d, n in enumerate(value.shape)]
    return torch.empty(shape, dtype=value.dtype, device=device)


def _symbolic(number: int, dim: int, ndim: int, given: list[FakeTensor], sizes: Sizes) -> Any:
    """The size of an argument that is `number`: first at the same place, then anywhere."""
    same_place = [t.shape[dim] for t in given if t.ndim == ndim]
    for size in (*same_place, *(size for t in given for size in t.shape)):
        if isinstance(size, torch.SymInt) and _number(size, sizes) == number:
            return size
    return number
