"""From the options of `quantize` and `plan` to modifiers; a recipe says more than these can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fxcalib.errors import OptionError, nearest
from fxcalib.modifiers import (
    AWQModifier,
    GPTQModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    SmoothQuantModifier,
    SparseGPTModifier,
    WandaModifier,
)
from fxcalib.recipes import load_recipe

DEFAULT_SCHEME = "W4A16"
DEFAULT_SPARSITY = 0.5

QUANTIZERS = ("gptq", "rtn", "awq")
PRUNERS = ("sparsegpt", "wanda", "magnitude")
ALGORITHMS = (*QUANTIZERS, *PRUNERS)

KV_CACHE_SCHEMES = {
    name: {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False, "symmetric": True}
    for name, kind in (("fp8", "float"), ("int8", "int"))
}
"""One scale for all keys of a layer and one for all values, as vLLM reads them."""


@dataclass(frozen=True)
class Choice:
    """What is to be done to a model, by options with a meaning of their own. None leaves an option out."""

    algorithm: str = "gptq"
    scheme: str | Mapping[str, Any] | None = None
    """None: W4A16, where something is quantized."""
    group_size: int | None = None
    ignore: str | Sequence[str] | None = None
    smoothquant: float | None = None
    """Strength of SmoothQuant before the algorithm, 0 to 1."""
    sparsity: float | None = None
    """Part of the weights that a pruning algorithm removes; None: a half, or what the mask structure says."""
    mask_structure: str | None = None
    kv_cache_scheme: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.algorithm, str):
            object.__setattr__(self, "algorithm", self.algorithm.lower())

    @property
    def prunes(self) -> bool:
        """Whether the algorithm prunes and quantizes nothing."""
        return self.algorithm in PRUNERS

    @property
    def label(self) -> str | None:
        """Readable scheme, such as `W4A16 group 64`; None where the modules' own descriptions say it better."""
        scheme = DEFAULT_SCHEME if self.scheme is None else self.scheme
        if self.prunes or not isinstance(scheme, str):
            return None
        return scheme.upper() if self.group_size is None else f"{scheme.upper()} group {self.group_size}"

    def modifiers(self) -> list[Modifier]:
        """The modifiers that do it, in order.

        Raises:
            OptionError: an option that does not exist, or does not go with the algorithm.
        """
        self._check()
        if self.prunes:
            return [_pruner(self.algorithm, self.sparsity, self.mask_structure, self.ignore)]
        quantizer = GPTQModifier if self.algorithm == "gptq" else QuantizationModifier
        before: list[Modifier] = [AWQModifier()] if self.algorithm == "awq" else []
        if self.smoothquant is not None:
            before = [SmoothQuantModifier(smoothing_strength=self.smoothquant)]
        cache = _cache_scheme(self.kv_cache_scheme)
        scheme = DEFAULT_SCHEME if self.scheme is None else self.scheme
        settings: dict[str, Any] = {} if cache is None else {"kv_cache_scheme": cache}
        return [*before, quantizer(scheme=scheme, group_size=self.group_size, ignore=self.ignore, **settings)]

    def _check(self) -> None:
        if not isinstance(self.algorithm, str):
            raise OptionError(f"algorithm is {self.algorithm!r}; give one of {', '.join(ALGORITHMS)}")
        if self.algorithm not in ALGORITHMS:
            raise OptionError(f"unknown algorithm {self.algorithm!r}: {nearest(self.algorithm, ALGORITHMS)}")
        prunes, quantizes = ("sparsity", "mask_structure"), ("scheme", "group_size", "smoothquant", "kv_cache_scheme")
        for option in quantizes if self.prunes else prunes:
            if getattr(self, option) is not None:
                others = QUANTIZERS if self.prunes else PRUNERS
                raise OptionError(
                    f"{option} does not go with algorithm {self.algorithm!r}, only with {', '.join(others)}; a recipe "
                    "can name modifiers of both kinds"
                )
        if self.smoothquant is not None and self.algorithm == "awq":
            raise OptionError("smoothquant and awq scale the same channels; use smoothquant with gptq or rtn")


def chosen_modifiers(
    choice: Choice, modifiers: Modifier | Sequence[Modifier] | None, recipe: str | Path | Mapping[str, Any] | None
) -> Sequence[Modifier]:
    """What to do: `modifiers`, else what `recipe` says, else `choice`.

    Raises:
        OptionError: both modifiers and a recipe, something else than modifiers, or what the options refuse.
    """
    if modifiers is not None and recipe is not None:
        raise OptionError("modifiers and a recipe are given; give one of them")
    if recipe is not None:
        return load_recipe(recipe)
    return choice.modifiers() if modifiers is None else listed(modifiers)


def listed(modifiers: Modifier | Sequence[Modifier]) -> Sequence[Modifier]:
    """One modifier or several as a sequence; a `Recipe` stays one.

    Raises:
        OptionError: something else among them.
    """
    several = isinstance(modifiers, Iterable) and not isinstance(modifiers, str)
    found = modifiers if isinstance(modifiers, Sequence) and several else None
    if found is None:
        found = list(cast(Iterable[Modifier], modifiers)) if several else [cast(Modifier, modifiers)]
    for each in found:
        if not isinstance(each, Modifier):
            raise OptionError(
                f"modifiers holds {each!r}, a {type(each).__name__}; "
                "give modifiers, such as GPTQModifier(scheme='W4A16')"
            )
    return found


def _pruner(
    algorithm: str, sparsity: float | None, mask_structure: str | None, ignore: str | Sequence[str] | None
) -> Modifier:
    structure = "0:0" if mask_structure is None else mask_structure
    kept, _, run = str(structure).partition(":")
    if sparsity is None:  # recipes name it in any case
        patterned = kept.isdecimal() and run.isdecimal() and int(run) > 0
        sparsity = 1 - int(kept) / int(run) if patterned else DEFAULT_SPARSITY
    if algorithm == "magnitude":
        return MagnitudePruningModifier(
            init_sparsity=0.0, final_sparsity=sparsity, mask_structure=structure, targets=["Linear"], ignore=ignore
        )
    pruner = SparseGPTModifier if algorithm == "sparsegpt" else WandaModifier
    return pruner(sparsity=sparsity, mask_structure=structure, ignore=ignore)


def _cache_scheme(given: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not isinstance(given, str):
        return given
    if given.lower() not in KV_CACHE_SCHEMES:
        raise OptionError(f"unknown kv_cache_scheme {given!r}: {nearest(given, KV_CACHE_SCHEMES)}")
    return KV_CACHE_SCHEMES[given.lower()]
