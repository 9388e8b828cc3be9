"""Quantization of what attention keeps of earlier tokens: scales of keys and values, calibrated on both.

A module of compressed-tensors takes the place of each attention's cache and quantizes keys and values on their way into
it. Readers of a checkpoint do the same from `kv_cache_scheme` in its config and `k_scale`, `v_scale` beside the weights
of the attention. compressed-tensors (up to 0.20 at least) finds no attention in transformers 5.24, where the argument
that it goes by has another name; so it is found here by any of the names.

Axes: B batch, H heads of keys and values, S sequence, D head dimension.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.modeling import (
    KV_CACHE_ATTR,
    QuantizedKVCache,
    register_key_hook,
    register_value_hook,
)
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    initialize_attn_qparams,
)
from compressed_tensors.quantization.utils import KV_CACHE_TARGETS
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxcalib.errors import AlreadyQuantizedError, ModelError, NonFiniteActivationError, OptionError, TargetError
from fxcalib.math.ranges import HeadMinMax, MinMax, Range
from fxcalib.modifiers import qargs
from fxcalib.modifiers.base import CurrentBatch, ModuleResult, Scope
from fxcalib.profiling import span

_PARTS = ("k", "v")
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
_CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value")
"""What transformers calls the cache that attention is handed, newest name first."""
_STATIC = (QuantizationStrategy.TENSOR, QuantizationStrategy.ATTN_HEAD)
_DYNAMIC = (QuantizationStrategy.TENSOR, QuantizationStrategy.TOKEN)


def read_kv_cache_scheme(given: object) -> QuantizationArgs | None:
    """The arguments for keys and values that a `kv_cache_scheme` stands for; None for None.

    Args:
        given: `QuantizationArgs` or a dict of its fields, such as `{"num_bits": 8, "type": "float"}`.

    Raises:
        OptionError: not readable as that, or nothing that a cache can have.
    """
    if given is None:
        return None
    if isinstance(given, QuantizationArgs):
        args = given.model_copy(deep=True)
    elif isinstance(given, Mapping):
        try:
            args = QuantizationArgs(**given)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise OptionError(f"kv_cache_scheme cannot be read: {error}") from error
    else:
        raise OptionError(f"kv_cache_scheme is {given!r}; give a dict such as {{'num_bits': 8, 'type': 'float'}}")
    qargs.refuse_impossible("kv_cache_scheme", args)
    strategies = _STATIC if args.dynamic is False else _DYNAMIC
    if args.strategy not in strategies:
        raise OptionError(
            f"kv_cache_scheme has strategy '{args.strategy}' and dynamic={args.dynamic}; with it a cache can have "
            + " or ".join(repr(strategy.value) for strategy in strategies)
        )
    if args.type == "float" and (args.num_bits != 8 or not args.symmetric):
        raise OptionError("kv_cache_scheme: a cache of floats has 8 bits and symmetric=True; or use type 'int'")
    if args.scale_dtype is not None:
        raise OptionError(f"kv_cache_scheme: scale_dtype {args.scale_dtype} is not kept; leave it out")
    observer, _ = qargs.observer_of(args, qargs.DEFAULT_ACTIVATION_OBSERVER)
    if args.strategy == QuantizationStrategy.ATTN_HEAD and observer != "minmax":
        raise OptionError(f"kv_cache_scheme: observer {args.observer!r} has no scale for each head; use 'minmax'")
    return args


class KeyValueCache:
    """The attention modules of a model that cache keys and values, and what was seen of both.

    Until its commit an attention caches keys and values as they are.
    """

    def __init__(self, args: QuantizationArgs) -> None:
        self._args = args
        self._names: tuple[str, ...] = ()
        self._committed: set[str] = set()
        self._ranges: dict[tuple[str, str], Range] = {}
        self._hooks: dict[str, RemovableHandle] = {}

    @property
    def needs_data(self) -> bool:
        """Whether there are scales to calibrate."""
        return qargs.is_static(self._args)

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules that stand in the place of the caches: calling one is what is observed and changed."""
        return frozenset(f"{name}.{KV_CACHE_ATTR}" for name in self._names)

    def attach(self, model: nn.Module) -> None:
        """Put the modules in place and make room for scales.

        Raises:
            TargetError: no attention of the model keeps keys and values in a cache that is handed to it.
            AlreadyQuantizedError, OptionError: an attention module has a scheme.
            ModelError: compressed-tensors cannot tell the sizes of the heads.
        """
        candidates = ((name, module, _cache_argument(module)) for name, module in model.named_modules())
        attention = [(name, module, argument) for name, module, argument in candidates if argument is not None]
        config = getattr(model, "config", None)
        if not attention or config is None:
            raise TargetError(
                "kv_cache_scheme finds no attention with a cache: a module of a transformers model with 'Attention' in "
                "the name of its class, with `k_proj`, `v_proj`, `qkv_proj` or `kv_b_proj`, and with `cache` or "
                "`past_key_values` among the arguments of its forward; leave kv_cache_scheme out for this model"
            )
        for name, module, _ in attention:
            _refuse_quantized(name, module)
        self._names = tuple(name for name, *_ in attention)
        self._committed = set()
        scheme = QuantizationScheme(targets=list(KV_CACHE_TARGETS), input_activations=self._args)
        for name, module, argument in attention:
            module.register_module(KV_CACHE_ATTR, QuantizedKVCache(config.get_text_config(decoder=True), module))
            self._hooks[name] = module.register_forward_pre_hook(_takes_the_place_of(argument), with_kwargs=True)
            try:
                initialize_attn_qparams(module, scheme, force_zero_point=False)
            except (ValueError, AttributeError) as error:
                raise ModelError(
                    f"keys and values of {name!r} cannot be quantized: {error}; leave kv_cache_scheme out"
                ) from error
            module.quantization_scheme = scheme
            module.quantization_status = QuantizationStatus.INITIALIZED
            module.quantization_enabled = False

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        """Collect the ranges of keys and values, as attention hands them to its cache, while the context is open."""
        ranges: dict[tuple[str, str], Range] = {}
        checks: list[tuple[int, str, str, Tensor]] = []
        handles = []
        try:
            if self.needs_data:
                for name in self._pending(scope):
                    module = scope.model.get_submodule(name)
                    for part, register in zip(_PARTS, (register_key_hook, register_value_hook), strict=True):
                        ranges[name, part] = self._empty_range()
                        hook = _hook(name, part, ranges[name, part], scope, checks)
                        handles.append(register(module, hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
        with span("statistics"):
            _refuse_non_finite(checks)
        seen = {(name, part) for _, name, part, _ in checks}
        self._ranges = {key: statistic for key, statistic in ranges.items() if key in seen}

    def commit(self, scope: Scope) -> list[ModuleResult]:
        """Store the scales of the scope's attention modules, and quantize what they cache from now on."""
        results = []
        for name in self._pending(scope):
            began = time.perf_counter()
            module = scope.model.get_submodule(name)
            notes: tuple[str, ...] = ()
            for part in _PARTS if self.needs_data else ():
                statistic = self._ranges.get((name, part))
                if statistic is None:
                    statistic = _unit_range(_home(module))
                    notes = ("no batch reached it: its scales cover the values from -1 to 1",)
                self._store(name, module, part, statistic)
            module.quantization_status = QuantizationStatus.DECOMPRESSED
            del module.quantization_enabled
            scheme = f"key-value cache {qargs.describe_args(self._args, activations=True)}"
            results.append(ModuleResult(name, scheme, None, "output", time.perf_counter() - began, notes))
            self._committed.add(name)
        self._ranges = {}
        return results

    def detach(self, model: nn.Module) -> None:
        """Take away what was never committed; the scales of the rest go where the weights are."""
        for name in self._names:
            module = model.get_submodule(name)
            if name not in self._committed:
                self._remove(name, module)
                continue
            for key in _parameters(module):
                parameter = getattr(module, key)
                parameter.data = parameter.data.to(_home(module))
        self._names, self._committed, self._ranges, self._hooks = (), set(), {}, {}

    def _pending(self, scope: Scope) -> list[str]:
        return [n for n in self._names if n not in self._committed and f"{n}.{KV_CACHE_ATTR}" in scope.modules]

    def _empty_range(self) -> Range:
        if self._args.strategy == QuantizationStrategy.ATTN_HEAD:
            return HeadMinMax()
        return qargs.range_of(self._args)

    def _store(self, name: str, module: nn.Module, part: str, statistic: Range) -> None:
        attached = getattr(module, f"{part}_scale")
        scales = qargs.scale_format_of(self._args, attached.dtype, None)
        scale, zero_point = statistic.qparams(qargs.grid_of(self._args), scales)
        if scale.numel() not in (1, attached.numel()):
            raise OptionError(
                f"{name!r} caches keys and values of {scale.numel()} heads, but the model's config says "
                f"{attached.numel()}; use kv_cache_scheme with strategy 'tensor'"
            )
        for key, value in ((f"{part}_scale", scale), (f"{part}_zero_point", zero_point)):
            if value is not None:
                # Where the keys and values are: no weight may have been brought there.
                stored = value.reshape(-1, *[1] * (attached.dim() - 1)).expand(attached.shape)
                stored = stored.to(getattr(module, key).dtype).contiguous()
                setattr(module, key, nn.Parameter(stored, requires_grad=False))

    def _remove(self, name: str, module: nn.Module) -> None:
        if name in self._hooks:
            self._hooks[name].remove()
        attributes = (KV_CACHE_ATTR, "quantization_scheme", "quantization_status", "quantization_enabled")
        for attribute in (*_parameters(module), *attributes):
            if hasattr(module, attribute):
                delattr(module, attribute)


def _cache_argument(module: nn.Module) -> str | None:
    """The name of the argument that hands `module` its cache; None where it is no attention with one."""
    if "attention" not in type(module).__name__.lower() or not any(hasattr(module, name) for name in _PROJECTIONS):
        return None
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


def _takes_the_place_of(argument: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook before an attention's forward: it is handed the module that quantizes, and that the cache itself."""

    def hook(
        module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [keywords.pop(name) for name in _CACHE_ARGUMENTS if name in keywords]
        quantized = getattr(module, KV_CACHE_ATTR)
        quantized.add_past_key_values(next((cache for cache in given if cache is not None), None))
        return positional, {**keywords, argument: quantized}

    return hook


def _hook(
    name: str, part: str, statistic: Range, scope: Scope, checks: list[tuple[int, str, str, Tensor]]
) -> Callable[[nn.Module, Tensor], None]:
    def see(module: nn.Module, states_BHSD: Tensor) -> None:
        if not states_BHSD.numel() or scope.batch.original:
            return
        with span("statistics"):
            statistic.add(states_BHSD.detach(), _real(states_BHSD, scope.batch))
            low, high = statistic.extremes()
            checks.append((scope.batch.index, name, part, (high - low).sum()))

    return see


def _real(states_BHSD: Tensor, batch: CurrentBatch) -> Tensor | None:
    """Which keys or values are of real tokens, (B, H, S) bool; None where none is known to be padding."""
    mask = batch.token_mask
    if mask is None or states_BHSD.dim() != 4 or (states_BHSD.shape[0], states_BHSD.shape[2]) != mask.shape:
        return None
    return mask.to(states_BHSD.device)[:, None].expand(states_BHSD.shape[:3])


def _refuse_non_finite(checks: list[tuple[int, str, str, Tensor]]) -> None:
    if not checks or bool(torch.isfinite(torch.stack([check for *_, check in checks])).all()):
        return
    batch, name, part, _ = next(c for c in sorted(checks, key=lambda c: c[0]) if not bool(torch.isfinite(c[3])))
    raise NonFiniteActivationError(
        f"the {'keys' if part == 'k' else 'values'} of module {name!r} hold NaN or infinity in batch {batch}; "
        "check that batch's data, or run the model in a dtype with more range (bfloat16 or float32)"
    )


def _refuse_quantized(name: str, module: nn.Module) -> None:
    if not hasattr(module, "quantization_scheme"):
        return
    if getattr(module, "quantization_status", None) == QuantizationStatus.INITIALIZED:
        raise OptionError(f"the keys and values of {name!r} are quantized by another modifier too; give one of them")
    raise AlreadyQuantizedError(f"module {name!r} is quantized already; start from the original checkpoint")


def _parameters(module: nn.Module) -> list[str]:
    names = [f"{part}_{kind}" for part in _PARTS for kind in ("scale", "zero_point")]
    return [name for name in names if name in module._parameters]


def _home(module: nn.Module) -> torch.device:
    """Where the weights of an attention are."""
    own = set(_parameters(module))
    return next(p.device for name, p in module.named_parameters() if name not in own)


def _unit_range(device: torch.device) -> MinMax:
    statistic = MinMax()
    statistic.add(torch.tensor([-1.0, 1.0], device=device), None)
    return statistic
