"""The options that quantize and plan share, as one value; names are those of `fxcalib.quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcalib.cli import options as o
from fxcalib.cli.words import given
from fxcalib.errors import OptionError

_RECIPE = (
    *("algorithm", "scheme", "group_size", "ignore"),
    *("smoothquant", "sparsity", "mask_structure", "kv_cache_scheme"),
)
"""What a recipe says."""


@dataclass(frozen=True)
class RunOptions:
    """What to do to a model, on which data, and how."""

    algorithm: o.Algorithm = None
    scheme: o.Scheme = None
    group_size: o.GroupSize = None
    ignore: o.Ignore = None
    smoothquant: o.SmoothQuant = None
    sparsity: o.Sparsity = None
    mask_structure: o.MaskStructure = None
    kv_cache_scheme: o.KVCacheScheme = None
    recipe: o.Recipe = None
    data: o.Data = None
    text_column: o.TextColumn = None
    completion_only: o.CompletionOnly = False
    streaming: o.Streaming = False
    samples: o.Samples = None
    seq_len: o.SequenceLength = None
    batch_size: o.MicroBatch = None
    pack: o.Pack = True
    seed: o.Seed = 0
    pipeline: o.Pipeline = None
    targets: o.Targets = None
    targets_per_subgraph: o.TargetsPerSubgraph = 1
    propagate_error: o.PropagateError = True
    suspended: o.Suspended = False
    offload: o.Offload = "auto"
    device: o.Device = None
    dtype: o.Dtype = "auto"
    trust_remote_code: o.TrustRemoteCode = False
    overwrite: o.Overwrite = False

    def given(self) -> dict[str, Any]:
        """Keyword arguments of `quantize`, without those that were left out.

        Raises:
            OptionError: a recipe and an option for what a recipe says.
        """
        found = given(self)
        double = [name for name in _RECIPE if name in found]
        if self.recipe is not None and double:
            raise OptionError(
                f"--recipe and --{double[0].replace('_', '-')} are given; write it into the recipe, or leave one out"
            )
        return found

    def default_output(self, model: str) -> Path:
        """Folder of the checkpoint where none was named: after the model and what is done to it, in the current one."""
        if self.recipe is not None:
            return default_output(model, self.recipe.stem)
        pruned = self.algorithm if self.algorithm in ("sparsegpt", "wanda", "magnitude") else None
        return default_output(model, self.scheme or pruned or "W4A16")


def default_output(model: str, done: str) -> Path:
    """A folder in the current one, named after a model and what is done to it."""
    return Path(f"{Path(model).expanduser().resolve().name}-{done}")
