"""Every error that fxcalib raises on purpose.

FxcalibError
├── OptionError          an option, scheme, algorithm or pipeline that does not exist or cannot work (also ValueError)
│   └── RecipeError      a recipe that cannot be read, with its file, line and key
├── TargetError          a target or ignore pattern that matches nothing (also ValueError)
├── ModelError           a model that cannot be found, loaded or compressed
│   ├── AlreadyQuantizedError
│   └── NonFiniteWeightError
├── DataError            calibration or evaluation data that cannot be used
│   ├── BatchError       a batch the model cannot take: missing keys, token ids out of the vocabulary
│   └── NonFiniteActivationError
├── OutputError          an output folder or file that cannot be written
├── RendererError        a picture that cannot be drawn with what is installed
├── PlanError            a schedule that reads what was not written
└── TraceError           (in fxcalib.tracing, also torch.fx.proxy.TraceError) a model that cannot be traced
    └── GuardError       a batch that breaks an assumption of the trace

Each message names the culprit, the cause and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxcalibError(Exception):
    """Base of all errors that fxcalib raises on purpose."""


class OptionError(FxcalibError, ValueError):
    """An option, scheme, algorithm or pipeline that does not exist or cannot work."""


class RecipeError(OptionError):
    """A recipe that cannot be read; the message begins with its file, line and key."""


class TargetError(FxcalibError, ValueError):
    """A target or ignore pattern that matches no module."""


class ModelError(FxcalibError):
    """A model that cannot be found, loaded or compressed."""


class AlreadyQuantizedError(ModelError):
    """A model that carries a quantization config already."""


class NonFiniteWeightError(ModelError):
    """A parameter that holds NaN or infinity."""


class DataError(FxcalibError):
    """Calibration or evaluation data that cannot be used."""


class BatchError(DataError):
    """A batch that the model cannot take."""


class NonFiniteActivationError(DataError):
    """A module whose output holds NaN or infinity during calibration."""


class OutputError(FxcalibError):
    """An output folder or file that cannot be written."""


class RendererError(FxcalibError):
    """A picture that cannot be drawn with what is installed."""


class PlanError(FxcalibError):
    """A schedule that reads a value before it is written or after it is freed."""


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """`did you mean ...?` text with the closest of `choices` to `name`, or all of them where none is close."""
    options = sorted(set(choices))
    close = difflib.get_close_matches(name.lower(), [o.lower() for o in options], n=limit, cutoff=0.5)
    by_lower = {o.lower(): o for o in options}
    if close:
        return "did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"
    shown = options[:12]
    more = f", ... ({len(options)} in all)" if len(options) > len(shown) else ""
    return "choose from " + ", ".join(shown) + more
