"""The options of calibration data and pipelines, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxcalib.errors import OptionError


@dataclass(frozen=True)
class DatasetArguments:
    """How a pipeline passes data through a model. Names are llm-compressor's where they mean the same."""

    sequential_targets: tuple[str, ...] | None = None
    """Class names, module names or `re:` patterns; None: the model's no-split modules."""
    sequential_targets_per_subgraph: int = 1
    sequential_offload_device: str = "cpu"
    """Where intermediates lie between batches: `cpu`, `none` (where they are computed) or a device."""
    device: str | None = None
    """Where subgraphs run; None: the accelerator if there is one, else the CPU."""
    tracing_ignore: tuple[str, ...] = ()
    """Modules to keep whole in the trace although sequential targets lie in them."""
    propagate_error: bool = True
    """Whether later subgraphs are calibrated on what the compressed earlier ones put out."""
    suspended: bool = False
    """In the layer_sequential pipeline: suspend the model's own forwards instead of calling the layers in a chain."""
    seed: int = 0
    """Of random operations in the model."""

    def compute_device(self) -> torch.device:
        """The device that subgraphs run on.

        Raises:
            OptionError: `device` is not available here.
        """
        if self.device is None:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return torch.device("cpu") if found is None else found
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(f"device {self.device!r} cannot be used here: {reason}; try 'cpu'") from error
        return device
