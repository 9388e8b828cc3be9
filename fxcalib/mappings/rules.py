"""How labels pass through ATen operations. An operation without a rule freezes the labels that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from fxcalib.mappings.values import NO_LABEL, Ledger, Size, Value, WeightView

Shape = tuple[Size, ...]
Result = Tensor | None | list[Tensor | None]


class NoRule(Exception):
    """The operation does not commute with the labels that it reads, or how it does is not known."""


def apply(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape], ledger: Ledger
) -> list[Value]:
    """What is known of the results of the ATen operation `name`, of these shapes, given its arguments.

    `args` and `kwargs` hold a `Value` in place of each tensor.
    """
    values = list(values_in((args, kwargs)))
    if all(value.labels is None and value.weight is None for value in values):
        return [Value(shape) for shape in shapes]
    if name in CONTRACTIONS:
        return [_contract(name, args, kwargs, shapes[0], ledger)]
    if name == "scaled_dot_product_attention":
        return [_attend(args, kwargs, shapes[0], ledger)]
    try:
        if any(value.weight is not None for value in values):
            if not isinstance(args[0], Value) or any(v.labels is not None or v.weight is not None for v in values[1:]):
                raise NoRule
            return [Value(shape, None, _weight_rule(name, args, shape)) for shape in shapes]
        rule = _RULES.get(name)
        if rule is None:
            raise NoRule
        labels = rule(args, kwargs, shapes)
    except NoRule:
        ledger.freeze(values, f"the operation {name}")
        return [Value(shape) for shape in shapes]
    found = labels if isinstance(labels, list) else [labels]
    return [Value(shape, label) for shape, label in zip(shapes, found, strict=True)]


def keeps(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the in-place operation `name` leaves its first argument with the labels that it has.

    If so, they stay true of every view of the same memory as well.
    """
    target, *others = values_in((args, kwargs))
    if target is not args[0] or any(other.labels is not None for other in others) or target.weight is not None:
        return False
    return name in ("mul_", "div_", "relu_", "neg_") or (name == "masked_fill_" and _fills_zero(args))


def values_in(nested: object) -> Iterator[Value]:
    """Every `Value` in nested tuples, lists and dicts, in order."""
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for each in nested:
            yield from values_in(each)
    elif isinstance(nested, dict):
        yield from values_in(list(nested.values()))


def _same(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labels: Tensor | None = args[0].labels
    return labels


def _reshape(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    return reshaped(args[0], shapes[0])


def reshaped(value: Value, shape: Shape) -> Tensor:
    """Labels of `value` in another shape of as many elements.

    Both shapes are cut into runs of dimensions with the same product: what does not vary along a run stays so, whatever
    its sizes are.
    """
    labels = value.labels
    assert labels is not None
    before = [(size, labels.shape[d]) for d, size in enumerate(value.shape) if size != 1]
    labels = labels.reshape([kept for _, kept in before])
    pieces: list[int] = []
    at = 0
    after = [size for size in shape if size != 1]
    for old, new in _runs([size for size, _ in before], after):
        kept = labels.shape[at : at + len(old)]
        if all(size == 1 for size in kept):
            labels = labels.reshape(*labels.shape[:at], *(1,) * len(new), *labels.shape[at + len(old) :])
            pieces += [1] * len(new)
        else:
            if not all(_is_number(size) for size in (*old, *new)):
                raise NoRule
            sizes, results = [int(str(size)) for size in old], [int(str(size)) for size in new]
            labels = labels.expand(*labels.shape[:at], *sizes, *labels.shape[at + len(old) :])
            labels = labels.reshape(*labels.shape[:at], *results, *labels.shape[at + len(old) :])
            pieces += results
        at += len(new)
    sizes_left = iter(pieces)
    return labels.reshape([1 if size == 1 else next(sizes_left) for size in shape])


def _runs(old: Sequence[Size], new: Sequence[Size]) -> Iterator[tuple[list[Size], list[Size]]]:
    """The shortest runs of dimensions, from the left, whose products are equal; of sizes other than 1."""
    i = j = 0
    while i < len(old) or j < len(new):
        if i == len(old) or j == len(new):
            raise NoRule
        left, right = [old[i]], [new[j]]
        product, other = sympy.sympify(old[i]), sympy.sympify(new[j])
        while product != other:
            if _is_factor(product, other):
                i += 1
                if i == len(old):
                    raise NoRule
                left.append(old[i])
                product *= sympy.sympify(old[i])
            else:
                j += 1
                if j == len(new):
                    raise NoRule
                right.append(new[j])
                other *= sympy.sympify(new[j])
        yield left, right
        i, j = i + 1, j + 1


def _is_factor(product: sympy.Expr, other: sympy.Expr) -> bool:
    if product.is_number and other.is_number:
        return bool(product < other)
    return bool(sympy.denom(sympy.cancel(other / product)) == 1)


def _is_number(size: Size) -> bool:
    return bool(sympy.sympify(size).is_number)


def _transpose(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labels: Tensor = args[0].labels
    return labels.transpose(args[1], args[2])


def _permute(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labels: Tensor = args[0].labels
    return labels.permute(args[1])


def _t(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labels: Tensor = args[0].labels
    return labels.transpose(-2, -1) if labels.dim() > 1 else labels


def _expand(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labels: Tensor = args[0].labels
    return labels.reshape((1,) * (len(shapes[0]) - labels.dim()) + tuple(labels.shape))


def _slice(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    value: Value = args[0]
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, end, step = given
    if not value.varies(dim):
        return value.labels
    assert value.labels is not None
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        raise NoRule
    sliced: Tensor = torch.ops.aten.slice.Tensor(value.labels, dim, start, end, step)
    return sliced


def _select(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    value, dim, index = args[:3]
    if not value.varies(dim):
        index = 0
    if not isinstance(index, int):
        raise NoRule
    selected: Tensor = value.labels.select(dim, index)
    return selected


def _pieces(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    """`split`, `split_with_sizes`, `chunk`: pieces along a dimension, each of the size it has among the results."""
    value: Value = args[0]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    assert value.labels is not None
    if not value.varies(dim):
        return [value.labels] * len(shapes)
    start, pieces = 0, []
    for shape in shapes:
        pieces.append(value.labels.narrow(dim, start, int(str(shape[dim]))))
        start += int(str(shape[dim]))
    return [*pieces]


def _unbind(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    value: Value = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return [_select((value, dim, i), {}, ()) for i in range(len(shapes))]  # type: ignore[misc]


def _index(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    """Chosen at one or more neighbouring dimensions, along which nothing varies."""
    value, indices = args[0], args[1]
    labels = value.labels
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    first, after = chosen[0], chosen[-1] + 1
    together = len(chosen) == after - first
    if labels is None or not together or any(value.varies(dim) for dim in chosen):
        raise NoRule
    kept = (*labels.shape[:first], *labels.shape[after:])
    shape = (*kept[:first], *(1,) * (len(shapes[0]) - len(kept)), *kept[first:])
    return cast(Tensor, labels.reshape(shape))


def _repeat_interleave(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    value, repeats = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None or not isinstance(repeats, int):
        raise NoRule
    labels: Tensor = value.labels
    return labels.repeat_interleave(repeats, dim) if value.varies(dim) else labels


def _cat(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    parts: Sequence[Value] = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    known = [part.labels if part.labels is not None else _unlabelled(part) for part in parts]
    if not any(part.varies(dim) for part in parts) and all(torch.equal(known[0], each) for each in known):
        return known[0]
    dim %= len(shapes[0])
    widths = [part.shape[dim] for part in parts]
    if not all(_is_number(width) for width in widths):
        raise NoRule
    common = [max(label.shape[d] for label in known) for d in range(len(shapes[0])) if d != dim]
    stretched = [
        label.movedim(dim, 0).expand(int(str(width)), *common) for label, width in zip(known, widths, strict=True)
    ]
    return torch.cat(stretched).movedim(0, dim)


def _unlabelled(value: Value) -> Tensor:
    return torch.full((1,) * len(value.shape), NO_LABEL)


def _mul(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    labelled = [each for each in args[:2] if isinstance(each, Value) and each.labels is not None]
    if len(labelled) != 1:
        raise NoRule
    return _expand((labelled[0],), {}, shapes)


def _div(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    if kwargs or args[0].labels is None or (isinstance(args[1], Value) and args[1].labels is not None):
        raise NoRule
    return _expand(args[:1], {}, shapes)


def _masked_fill(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    if args[0].labels is None or args[1].labels is not None or not _fills_zero(args):
        raise NoRule
    return _expand(args[:1], {}, shapes)


def _fills_zero(args: Sequence[Any]) -> bool:
    """Whether `masked_fill` fills with zero, which every factor leaves zero."""
    return isinstance(args[2], (int, float)) and args[2] == 0


def _add(args: Sequence[Any], kwargs: dict[str, Any], shapes: Sequence[Shape]) -> Result:
    left, right = args[:2]
    if not isinstance(left, Value) or not isinstance(right, Value) or left.labels is None or right.labels is None:
        raise NoRule
    first, second = (_expand((each,), {}, shapes) for each in (left, right))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    if first.shape != second.shape or not torch.equal(first, second) or bool((first == NO_LABEL).any()):
        raise NoRule
    return first


def _attend(args: Sequence[Any], kwargs: dict[str, Any], shape: Shape, ledger: Ledger) -> Value:
    """softmax(q k^T) v, heads of v repeated for groups of q's: linear in v alone."""
    query, _, value = args[:3]
    others = [other for other in values_in((args, kwargs)) if other is not value]
    ledger.freeze(others, "attention scores")
    labels = value.labels
    if labels is None:
        return Value(shape)
    grouped = labels.dim() > 2 and value.varies(-3) and value.shape[-3] != query.shape[-3]
    known = _is_number(query.shape[-3]) and _is_number(value.shape[-3])
    if value.varies(-2) or (grouped and not known):
        ledger.freeze([value], "attention")
        return Value(shape)
    if grouped:
        labels = labels.repeat_interleave(int(str(query.shape[-3])) // int(str(value.shape[-3])), -3)
    return Value(shape, labels)


def _weight_rule(name: str, args: Sequence[Any], shape: Shape) -> WeightView:
    """A view of a parameter; NoRule for anything else that is done with it."""
    view: WeightView | None = args[0].weight
    if view is None:
        raise NoRule
    axes: list[int | None] = list(view.axes)
    if name in ("t", "numpy_T", "mT"):
        axes = axes[::-1] if len(axes) == 2 else [*axes[:-2], axes[-1], axes[-2]]
    elif name == "transpose":
        axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    elif name == "permute":
        axes = [axes[dim] for dim in args[1]]
    elif name == "select":
        del axes[args[1]]
    elif name == "index" and len(args[1]) == 1:
        axes = [*(None,) * (len(shape) - len(axes) + 1), *axes[1:]]
    elif name not in _UNCHANGED:
        raise NoRule
    return WeightView(view.path, tuple(axes))


def _contract(name: str, args: Sequence[Any], kwargs: dict[str, Any], shape: Shape, ledger: Ledger) -> Value:
    """A matrix product: a parameter reads the labels that it is contracted with, others must not vary there."""
    left, right, bias = operands(name, args, kwargs)
    added = [v for v in values_in((args, kwargs)) if v is not left and v is not right and v.labels is not None]
    if name != "linear":  # its weight is turned round, so that it is another value here
        ledger.freeze(added, f"the operation {name}")
    flipped = right.weight is None and left.weight is not None
    weight, inputs = (left, right) if flipped else (right, left)
    contracted = (-2 if len(inputs.shape) > 1 else -1) if flipped else -1
    if weight.weight is not None:
        axis = weight.weight.axes[-1 if flipped else -2 if len(weight.shape) > 1 else -1]
        alone = inputs.labels is None or all(
            not inputs.varies(dim) for dim in range(len(inputs.shape)) if dim != contracted % len(inputs.shape)
        )
        width = weight.shape[-1 if flipped else -2]
        if axis is not None and alone and inputs.weight is None and _is_number(width):
            flat = None if inputs.labels is None else inputs.labels.reshape(-1)
            ledger.read(weight.weight.path, axis, flat, int(str(width)))
            return Value(shape)
        ledger.freeze([left, right], f"the operation {name}")
        return Value(shape)
    labelled = [each for each in (left, right) if each.labels is not None]
    along = {id(left): -1, id(right): -2 if len(right.shape) > 1 else -1}
    if bias or len(labelled) != 1 or labelled[0].varies(along[id(labelled[0])]) or len(labelled[0].shape) < 2:
        ledger.freeze(labelled, f"the operation {name}")
        return Value(shape)
    labels = labelled[0].labels
    assert labels is not None
    return Value(shape, labels.reshape((1,) * (len(shape) - labels.dim()) + tuple(labels.shape)))


def operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Value, Value, bool]:
    """Both factors of a contraction as they are multiplied, and whether something is added to the product."""
    if name in ("addmm", "baddbmm"):
        return args[1], args[2], True
    if name == "linear":
        weight: Value = args[1]
        labels = None if weight.labels is None else weight.labels.transpose(-2, -1)
        view = None
        if weight.weight is not None:
            view = WeightView(weight.weight.path, weight.weight.axes[::-1])
        bias = (args[2] if len(args) > 2 else kwargs.get("bias")) is not None
        return args[0], Value(weight.shape[::-1], labels, view), bias
    return args[0], args[1], False


_UNCHANGED = (
    "contiguous", "clone", "to", "_to_copy", "detach", "detach_", "alias", "lift_fresh_copy", "type_as",
)  # fmt: skip
CONTRACTIONS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "_grouped_mm")
_Rule = Callable[[Sequence[Any], dict[str, Any], Sequence[Shape]], Result]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_UNCHANGED, _same),
    # positively homogeneous: a positive factor of the input is one of the output
    **dict.fromkeys(("neg", "relu", "abs", "leaky_relu"), _same),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "_reshape_alias"), _reshape
    ),
    "transpose": _transpose,
    "permute": _permute,
    "t": _t,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
    "unbind": _unbind,
    "index": _index,
    "repeat_interleave": _repeat_interleave,
    "cat": _cat,
    "mul": _mul,
    "masked_fill": _masked_fill,
    "div": _div,
    **dict.fromkeys(("add", "sub"), _add),
    "dropout": _same,
}
