"""compressed-tensors' `QuantizationArgs` in the terms of `fxcalib.math`."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import generate_gparam
from torch import Tensor

from fxcalib.errors import OptionError, nearest
from fxcalib.math.granularity import Granularity
from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, minmax_qparams, mse_qparams, percentile_qparams
from fxcalib.math.ranges import Histogram, MinMax, Range

# Every name means the same for weights and activations here; the variants of llm-compressor differ in how they average
# over batches, which a statistic of all the data does not need.
OBSERVERS = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
    "imatrix_mse": "mse",
    "percentile": "percentile",
}
INTEGER_BITS = range(2, 9)
FLOAT_BITS = (4, 6, 8)
DEFAULT_WEIGHT_OBSERVER = "mse"
DEFAULT_ACTIVATION_OBSERVER = "minmax"
# llm-compressor's. `patience` only stops its search early and `averaging_constant` weighs batches against each other:
# here every candidate is tried and every batch counts the same, so the two change nothing.
_OBSERVER_OPTIONS = {"norm", "maxshrink", "grid", "percentile", "patience", "averaging_constant"}


def refuse_impossible(role: str, args: QuantizationArgs) -> None:
    """Raise OptionError for `args` of `role` that no format stores or nothing here computes."""
    kind = QuantizationType(args.type)
    widths = INTEGER_BITS if kind == QuantizationType.INT else FLOAT_BITS
    if args.num_bits not in widths:
        raise OptionError(
            f"num_bits of {role} is {args.num_bits}; {kind.value} formats have {', '.join(map(str, widths))} bits"
        )
    if role != "weights" and args.strategy == QuantizationStrategy.GROUP and args.dynamic is False:
        raise OptionError(
            f"{role} in groups cannot have static scales: no checkpoint format holds one for each group; "
            "use dynamic=True, or strategy 'tensor' or 'token'"
        )
    observer_of(args, DEFAULT_WEIGHT_OBSERVER)


def grid_of(args: QuantizationArgs) -> Grid:
    """The codes of `args`."""
    return Grid("int" if args.type == "int" else "float", args.num_bits, args.symmetric)


def granularity_of(args: QuantizationArgs) -> Granularity:
    """The sharing pattern of a weight quantized with `args`."""
    if args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        return Granularity("group", columns=args.group_size or 0)
    if args.strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure or (0, 0)
        return Granularity("block", columns=columns, rows=rows)
    if args.strategy == QuantizationStrategy.CHANNEL:
        return Granularity("channel")
    return Granularity("tensor")


def scale_format_of(args: QuantizationArgs, dtype: torch.dtype, global_scale: Tensor | None) -> ScaleFormat:
    """How scales of `args` are stored in a module whose weight has `dtype`."""
    if args.scale_dtype == torch.uint8:
        return ScaleFormat(torch.bfloat16, power_of_two=True)
    return ScaleFormat(args.scale_dtype or dtype, global_scale=global_scale)


def global_scale_of(args: QuantizationArgs, low: Tensor, high: Tensor) -> Tensor | None:
    """The global scale (1,) float32 of two-level formats (NVFP4) for values in [low, high]; None for the others."""
    if args.strategy != QuantizationStrategy.TENSOR_GROUP:
        return None
    scale: Tensor = generate_gparam(low.float(), high.float())
    return scale


def search_weight(table_SE: Tensor, args: QuantizationArgs, scales: ScaleFormat, importance: Tensor | None) -> QParams:
    """Scales and zero points of a weight's table (S, E) with the observer of `args`, mean squared error by default."""
    observer, options = observer_of(args, DEFAULT_WEIGHT_OBSERVER)
    if observer == "minmax":
        return minmax_qparams(table_SE, grid_of(args), scales)
    if observer == "percentile":
        return percentile_qparams(table_SE, grid_of(args), scales, options.get("percentile", 99.9))
    settings: dict[str, Any] = {"norm": options.get("norm", 2.0)}
    if "maxshrink" in options or "grid" in options:
        shrink = min(options.get("maxshrink", 0.2), 0.95)
        settings |= {"smallest": 1 - shrink, "coarse": max(int(shrink * options.get("grid", 100)), 2)}
    return mse_qparams(table_SE, grid_of(args), scales, importance_RE=importance, **settings)


def range_of(args: QuantizationArgs) -> Range:
    """An empty statistic for static activation scales with the observer of `args`, min-max by default."""
    observer, options = observer_of(args, DEFAULT_ACTIVATION_OBSERVER)
    if observer == "minmax" or args.strategy == QuantizationStrategy.TENSOR_GROUP:
        return MinMax()
    return Histogram(options.get("percentile", 99.99) if observer == "percentile" else None)


def range_key(args: QuantizationArgs) -> tuple[Any, ...]:
    """Equal for arguments whose statistics are the same."""
    observer, options = observer_of(args, DEFAULT_ACTIVATION_OBSERVER)
    return observer, args.strategy, args.group_size, tuple(sorted(options.items()))


def observer_of(args: QuantizationArgs, default: str) -> tuple[str, dict[str, Any]]:
    """`minmax`, `mse` or `percentile`, and its options.

    Raises:
        OptionError: no such observer, or an option that none has.
    """
    name = args.observer or default
    if name not in OBSERVERS:
        raise OptionError(f"unknown observer {name!r}: {nearest(name, OBSERVERS)}")
    for option in args.observer_kwargs:
        if option not in _OBSERVER_OPTIONS:
            raise OptionError(f"observer {name!r} has no option {option!r}: {nearest(option, _OBSERVER_OPTIONS)}")
    return OBSERVERS[name], args.observer_kwargs


def default_observer(role: str, args: QuantizationArgs) -> str | None:
    """The name, as llm-compressor has it, of the observer that is used where `args` of `role` names none."""
    if role == "weights":
        return f"memoryless_{DEFAULT_WEIGHT_OBSERVER}"
    return f"static_{DEFAULT_ACTIVATION_OBSERVER}" if is_static(args) else None


def is_static(args: QuantizationArgs | None) -> bool:
    """Whether activations quantized with `args` need their range calibrated."""
    return args is not None and args.dynamic is not True


def describe(scheme: QuantizationScheme) -> str:
    """Readable form of a scheme, such as `int4 group 64 symmetric, input fp8 tensor static`."""
    roles = (("", scheme.weights), ("input ", scheme.input_activations), ("output ", scheme.output_activations))
    return ", ".join(f"{role}{describe_args(args, activations=bool(role))}" for role, args in roles if args is not None)


def describe_args(args: QuantizationArgs, *, activations: bool) -> str:
    """Readable form of arguments, such as `int4 group 64 symmetric`, and whether scales of activations are static."""
    kind = f"{'int' if args.type == 'int' else 'fp'}{args.num_bits}"
    size = f" {args.group_size}" if args.group_size is not None and args.group_size > 0 else ""
    if args.block_structure:
        size = " " + "x".join(map(str, args.block_structure))
    symmetry = ("symmetric" if args.symmetric else "asymmetric") if args.type == "int" else ""
    when = "" if not activations else "dynamic" if args.dynamic else "static"
    words = (kind, f"{QuantizationStrategy(args.strategy).value}{size}", symmetry, when)
    return " ".join(word for word in words if word)
