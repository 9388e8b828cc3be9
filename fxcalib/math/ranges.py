"""Running statistics of activations from which a static scale is found: extremes, or a bounded histogram.

Both live on the device of what they observe and never wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxcalib.math.grids import Grid, ScaleFormat
from fxcalib.math.qparams import QParams, mse_qparams, range_qparams

_BINS = 2048


class Range(ABC):
    """What has been seen of one activation."""

    @abstractmethod
    def add(self, values: Tensor, real: Tensor | None) -> None:
        """Add (..., features) floating `values`; `real`, a bool tensor of the leading shape, is false for padding."""

    @abstractmethod
    def qparams(self, grid: Grid, scales: ScaleFormat) -> QParams:
        """Scale and zero point, (S,) float32, one for each range kept."""

    @abstractmethod
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value seen, (S,) float32 each."""

    @abstractmethod
    def clone(self) -> Range:
        """A statistic of its own with the same contents."""


class MinMax(Range):
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    @torch.no_grad()
    def add(self, values: Tensor, real: Tensor | None) -> None:
        if real is not None:
            # Zero is inside every range, so zeroed padding leaves no trace; a product would let its NaN survive.
            values = torch.where(real[..., None], values, 0.0)
        low, high = (end.float() for end in self._ends(values))
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(values)
        return low.reshape(1), high.reshape(1)

    def extremes(self) -> tuple[Tensor, Tensor]:
        if self._low is None or self._high is None:
            raise ValueError("no values were added")
        return self._low, self._high

    def qparams(self, grid: Grid, scales: ScaleFormat) -> QParams:
        return range_qparams(*self.extremes(), grid, scales)

    def clone(self) -> MinMax:
        copy = type(self)()
        copy._low = None if self._low is None else self._low.clone()
        copy._high = None if self._high is None else self._high.clone()
        return copy


class HeadMinMax(MinMax):
    """The smallest and the largest value of each head of keys or values: (batch, heads, sequence, head dimension)."""

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values.amin((0, 2, 3)), values.amax((0, 2, 3))


class Histogram(Range):
    """Counts of the values in 2 x 2048 bins of one width around zero, for ranges that clip outliers.

    A value beyond the last bin doubles the width as often as needed, merging bins pairwise, which loses nothing but
    resolution: the standard bounded histogram of post-training calibration (Wu et al. 2020, "Integer quantization for
    deep learning inference", section 5.1; torch.ao's HistogramObserver). `percentile` clips to that percentage of the
    values, otherwise the range of least squared error over the histogram is searched.
    """

    def __init__(self, percentile: float | None = None) -> None:
        self._percentile = percentile
        self._width: Tensor | None = None
        self._counts: Tensor | None = None
        self._extremes = MinMax()

    @torch.no_grad()
    def add(self, values: Tensor, real: Tensor | None) -> None:
        self._extremes.add(values, real)
        weights = torch.ones(values.shape[:-1], device=values.device) if real is None else real.float()
        weights = weights[..., None].expand(values.shape).reshape(-1)
        values = values.reshape(-1).float()
        values = torch.where(weights > 0, values, 0.0)
        largest = torch.nan_to_num(values.abs().amax(), posinf=torch.finfo(torch.float32).max / 2)
        needed = torch.clamp(largest / _BINS, min=torch.finfo(torch.float32).tiny) * (1 + 1e-6)
        if self._width is None or self._counts is None:
            self._width = needed
            self._counts = torch.zeros(2 * _BINS, dtype=torch.float64, device=values.device)
        else:
            doublings = torch.log2(needed / self._width).ceil().clamp(min=0.0)
            self._width = self._width * torch.exp2(doublings)
            bins = torch.arange(-_BINS, _BINS, device=values.device)
            merged = torch.div(bins, torch.exp2(doublings), rounding_mode="floor").long()
            self._counts = torch.zeros_like(self._counts).index_add_(0, merged + _BINS, self._counts)
        bins = torch.nan_to_num(values / self._width).floor_().clamp_(-_BINS, _BINS - 1).long() + _BINS
        self._counts.index_add_(0, bins, weights.double())

    def extremes(self) -> tuple[Tensor, Tensor]:
        return self._extremes.extremes()

    def qparams(self, grid: Grid, scales: ScaleFormat) -> QParams:
        if self._width is None or self._counts is None:
            raise ValueError("no values were added")
        counts, width = self._counts.float(), self._width
        centres = (torch.arange(-_BINS, _BINS, device=counts.device) + 0.5) * width
        low, high = self.extremes()
        if self._percentile is None:
            # The extremes themselves are added without weight: they are the range that the search starts from.
            centres = torch.cat([centres.clamp(low, high), low, high])[None]
            weights = torch.cat([counts, counts.new_zeros(2)])[None]
            return mse_qparams(centres, grid, scales, importance_RE=weights, smallest=0.05, coarse=40, fine=8)
        share = self._percentile / 100
        if grid.symmetric:
            magnitude = counts[_BINS:] + counts[:_BINS].flip(0)
            reach = _reach(magnitude, share) * width
            reach = torch.minimum(reach, torch.maximum(-low, high))
            return range_qparams(-reach, reach, grid, scales)
        tail = (1 - share) / 2
        top = torch.minimum((_reach(counts, 1 - tail) - _BINS) * width, high)
        bottom = torch.maximum((_BINS - _reach(counts.flip(0), 1 - tail)) * width, low)
        return range_qparams(bottom, top, grid, scales)

    def clone(self) -> Histogram:
        copy = Histogram(self._percentile)
        copy._width = None if self._width is None else self._width.clone()
        copy._counts = None if self._counts is None else self._counts.clone()
        copy._extremes = self._extremes.clone()
        return copy


def _reach(counts: Tensor, share: float) -> Tensor:
    """Position, in bins from the first and interpolated within one, below which `share` of the counts lie; (1,)."""
    below = counts.double().cumsum(0)
    wanted = share * below[-1:]
    at = torch.searchsorted(below, wanted).clamp(max=len(counts) - 1)
    inside = counts[at].double()
    before = below[at] - inside
    return (at + ((wanted - before) / inside.clamp(min=1e-12)).clamp(0, 1)).float()
