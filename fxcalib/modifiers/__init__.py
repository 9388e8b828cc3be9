"""Compression algorithms, one file each, behind one protocol."""

from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.gptq import GPTQModifier
from fxcalib.modifiers.quantization import QuantizationModifier

__all__ = ["GPTQModifier", "Modifier", "ModuleResult", "Needs", "QuantizationModifier", "Scope"]
