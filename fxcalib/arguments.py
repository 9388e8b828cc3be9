"""The options of calibration data and pipelines, as one frozen value. Names are llm-compressor's where it has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from fxcalib.errors import OptionError

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 1024


@dataclass(frozen=True)
class DatasetArguments:
    """Which data calibrates a model and how a pipeline passes it through. None is the default of every field."""

    dataset: str | Path | None = None
    """A text, jsonl, json, csv or parquet file, a folder of those, or a `datasets` id; None: text that is shipped."""
    text_column: str | tuple[str, ...] | None = None
    """One column or several, the last of which is the completion; None: text, else chats, else prompt and completion"""
    streaming: bool = False
    """Whether the rows of a `datasets` id are fetched as they are needed."""
    use_loss_mask: bool = False
    """Whether only completions count for statistics: what the assistant says, else what follows the prompt."""
    num_calibration_samples: int | None = None
    """None: as many as there are, up to 128."""
    max_seq_length: int | None = None
    """Tokens a sample; None: 1024, or what the model takes where that is less."""
    batch_size: int | None = None
    """Samples a batch; None: as many as keep the device busy, within its memory."""
    concatenate_data: bool = True
    """Whether documents are joined to samples without padding; else each is one sample, padded to its batch."""
    sequential_targets: tuple[str, ...] | None = None
    """Class names, module names or `re:` patterns; None: the model's no-split modules."""
    sequential_targets_per_subgraph: int = 1
    sequential_offload_device: str = "auto"
    """Where intermediates lie between batches: `cpu`, `none` (where they are computed), a device, or `auto`: where they
    are computed as far as they fit, else on the CPU."""
    device: str | None = None
    """Where subgraphs run; None: the accelerator if there is one, else the CPU."""
    tracing_ignore: tuple[str, ...] = ()
    """Modules to keep whole in the trace although sequential targets lie in them."""
    propagate_error: bool = True
    """Whether later subgraphs are calibrated on what the compressed earlier ones put out."""
    suspended: bool = False
    """In the layer_sequential pipeline: suspend the model's own forwards instead of calling the layers in a chain."""
    seed: int = 0
    """Of the choice of samples, and of random operations in the model."""

    def __post_init__(self) -> None:
        """Fill in defaults, and refuse what is no whole number where one is needed; OptionError."""
        for field in fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.default)
        for name in ("sequential_targets", "tracing_ignore"):
            names: str | Iterable[str] | None = getattr(self, name)
            if names is not None:
                object.__setattr__(self, name, (names,) if isinstance(names, str) else tuple(names))
        for name, value in (
            ("samples", self.num_calibration_samples),
            ("seq_len", self.max_seq_length),
            ("batch_size", self.batch_size),
            ("targets_per_subgraph", self.sequential_targets_per_subgraph),
            ("seed", self.seed),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise OptionError(f"{name} is {value!r}, a {type(value).__name__}; it must be a whole number")

    @property
    def samples(self) -> int:
        """How many samples to take at most."""
        return DEFAULT_SAMPLES if self.num_calibration_samples is None else self.num_calibration_samples

    def seq_len(self, config: object) -> int:
        """Tokens a sample for a model with this transformers config, or None."""
        limit = getattr(config, "max_position_embeddings", None)
        return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN) if self.max_seq_length is None else self.max_seq_length

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
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(f"device {self.device!r} cannot be used here: {reason}; try 'cpu'") from error
        if device.type == "meta":
            raise OptionError("device 'meta' computes no values; use 'cpu', or fxcalib.plan to see what a run would do")
        return device
