"""Compression algorithms, one file each, behind one protocol."""

from fxcalib.modifiers.awq import AWQModifier
from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.gptq import GPTQModifier
from fxcalib.modifiers.magnitude import MagnitudePruningModifier
from fxcalib.modifiers.quantization import QuantizationModifier
from fxcalib.modifiers.smoothquant import SmoothQuantModifier
from fxcalib.modifiers.sparsegpt import SparseGPTModifier
from fxcalib.modifiers.wanda import WandaModifier

__all__ = [
    "AWQModifier",
    "GPTQModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "ModuleResult",
    "Needs",
    "QuantizationModifier",
    "Scope",
    "SmoothQuantModifier",
    "SparseGPTModifier",
    "WandaModifier",
]
