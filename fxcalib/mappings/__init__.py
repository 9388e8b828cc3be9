"""Channel mappings: which module's output channels feed which parameters, so that scales can move between them."""

from fxcalib.mappings.derivation import Derivation, derive, is_linear
from fxcalib.mappings.given import AWQMapping, parse, resolve
from fxcalib.mappings.mapping import ChannelMapping, Reader

__all__ = ["AWQMapping", "ChannelMapping", "Derivation", "Reader", "derive", "is_linear", "parse", "resolve"]
