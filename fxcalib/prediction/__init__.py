"""What a calibration will hold, move and compute, predicted before any weight is loaded."""

from __future__ import annotations

from fxcalib.prediction.dry_run import CarriedValue, DryRun, SubgraphPlan
from fxcalib.prediction.ledger import Moment, Moved
from fxcalib.prediction.machine import Rates
from fxcalib.prediction.predict import Calibration, predict

__all__ = ["Calibration", "CarriedValue", "DryRun", "Moment", "Moved", "Rates", "SubgraphPlan", "predict"]
