"""What the checkpoint formats of compressed-tensors can hold, so that a scheme that none holds is refused at once.

A format that does not fit is found late, when a model is saved, or not at all: some write scales in a dtype that rounds
them, or leave them out, and the checkpoint loads as another model.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from torch import nn

from fxcalib.errors import OptionError
from fxcalib.modifiers.qargs import describe, refuse_impossible

_ROLES = ("weights", "input_activations", "output_activations")
_MICROSCALING = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}
_UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
"""An integer or float of 8 bits for each weight."""


def refuse_unstorable(what: str, scheme: QuantizationScheme) -> None:
    """Refuse a scheme that no format holds, or not the one it names.

    Args:
        what: how the caller named the scheme.
        scheme: for modules of any kind.

    Raises:
        OptionError: naming the scheme, what does not fit, and what would.
    """
    for role in _ROLES:
        args: QuantizationArgs | None = getattr(scheme, role)
        if args is None:
            continue
        refuse_impossible(role, args)
        problem = _weights_problem(args) if role == "weights" else _activations_problem(role, args)
        if problem is not None:
            raise OptionError(f"{what} ({describe(scheme)}) fits no checkpoint format: {problem}")
    if scheme.format is not None:
        _refuse_format(what, scheme, CompressionFormat(scheme.format).value)


def format_of(module_type: type[nn.Module], scheme: QuantizationScheme) -> CompressionFormat:
    """The format that modules of `module_type` with `scheme` are stored in: what the scheme names, else what fits."""
    return CompressionFormat(scheme.format or infer_module_format(module_type, scheme))


def _weights_problem(args: QuantizationArgs) -> str | None:
    if args.dynamic is not False:
        return "weights have stored scales; set dynamic=False"
    if args.strategy in (QuantizationStrategy.TOKEN, QuantizationStrategy.ATTN_HEAD):
        return f"strategy '{args.strategy}' is one of activations; use 'group', 'channel', 'tensor' or 'block'"
    if args.type == QuantizationType.FLOAT:
        return _float_weights_problem(args)
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        return "only 4-bit floats have a global scale (NVFP4); use strategy 'group'"
    if args.scale_dtype not in (None, torch.uint8, torch.float8_e4m3fn):
        return f"scale_dtype {args.scale_dtype} is not kept; leave it out: scales have the dtype of the weight"
    if args.zp_dtype not in (None, torch.int8):
        return f"zp_dtype {args.zp_dtype} cannot be packed; leave it out"
    return None


def _float_weights_problem(args: QuantizationArgs) -> str | None:
    if not args.symmetric:
        return "floats have no zero point; set symmetric=True"
    bits = args.num_bits
    microscaled = args.strategy == QuantizationStrategy.GROUP and args.group_size == 32
    if microscaled and args.scale_dtype == torch.uint8:
        return None
    if bits == 8:
        if args.strategy == QuantizationStrategy.TENSOR_GROUP:
            return "only 4-bit floats have a global scale (NVFP4); use strategy 'group'"
        kept = (None, torch.uint8, torch.float8_e4m3fn)
        return None if args.scale_dtype in kept else f"scale_dtype {args.scale_dtype} is not kept; leave it out"
    two_level = args.strategy == QuantizationStrategy.TENSOR_GROUP and args.group_size == 16
    if bits == 4 and two_level and args.scale_dtype == torch.float8_e4m3fn:
        return None
    others = ", or strategy 'tensor_group' of 16 with scale_dtype torch.float8_e4m3fn (NVFP4)" if bits == 4 else ""
    return f"{bits}-bit floats need strategy 'group' of 32 with scale_dtype torch.uint8 (MXFP{bits}){others}"


def _activations_problem(role: str, args: QuantizationArgs) -> str | None:
    if args.strategy == QuantizationStrategy.ATTN_HEAD:
        return f"{role} of a module have no heads; use strategy 'tensor' or 'token', or kv_cache_scheme"
    if args.strategy in (QuantizationStrategy.CHANNEL, QuantizationStrategy.BLOCK):
        return f"{role} cannot have strategy '{args.strategy}'; use 'tensor' or 'token'"
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and args.dynamic is False:
        return f"{role} have no static scales in groups; use dynamic='local' (NVFP4) or strategy 'tensor'"
    return None


def _refuse_format(what: str, scheme: QuantizationScheme, named: str) -> None:
    fitting = _fitting(scheme.weights)
    if named not in fitting:
        raise OptionError(
            f"{what} ({describe(scheme)}) cannot be stored as {named!r}, only as {' or '.join(map(repr, fitting))}; "
            "leave `format` out, and the usual one is taken"
        )


def _fitting(weights: QuantizationArgs | None) -> list[str]:
    """Formats whose round trip gives the same weights; `dense` stores them as they are."""
    if weights is None:
        return ["dense"]
    if weights.type == QuantizationType.INT:
        return ["pack-quantized", *_UNPACKED, "dense"]
    if weights.strategy == QuantizationStrategy.TENSOR_GROUP:
        return ["nvfp4-pack-quantized", "dense"]
    microscaled = weights.group_size == 32 and weights.scale_dtype == torch.uint8
    unpacked = _UNPACKED if weights.num_bits == 8 else ()
    return [*([_MICROSCALING[weights.num_bits]] if microscaled else []), *unpacked, "dense"]
