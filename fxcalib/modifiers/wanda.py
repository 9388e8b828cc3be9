"""Wanda: weights of least magnitude times norm of their input become zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxcalib.math.pruning import Pattern, prune_lowest_in_rows, wanda_scores
from fxcalib.modifiers.magnitude import prune_by_magnitude
from fxcalib.modifiers.owl import OWLModifier, square_sums
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.sparsity_modifier import Pruning


class WandaModifier(OWLModifier):
    """Set the weights of least |W_ij| ||X_j|| of each output channel to zero; the others stay as they are.

    Sun et al. 2023, "A simple and effective pruning approach for large language models". Only the norm of each input
    channel is collected, not a Hessian, so errors are those of outputs if input channels were uncorrelated. Modules
    that no batch reaches are pruned by magnitude, with a note.

    Args:
        sparsity_profile, owl_m, owl_lmbda: as `OWLModifier` has them.
        sparsity, mask_structure, targets, ignore, sequential_targets, preserve_sparsity_mask: as `SparsityModifier` has
            them. Without a structure every output channel is pruned to `sparsity`.

    Raises:
        OptionError: arguments that contradict each other or are out of range.
    """

    @property
    def makes_statistics(self) -> Callable[[Tensor], InputStatistics] | None:
        return square_sums

    def prune(
        self, weights: Sequence[Tensor], sparsity: float | Pattern, statistics: InputStatistics | None
    ) -> Pruning:
        if statistics is None or statistics.squares is None:
            return prune_by_magnitude(weights, sparsity, ("pruned by magnitude: no calibration batch reached it",))
        pruned, errors = [], []
        for weight in weights:
            scores = wanda_scores(weight, statistics.squares.sum_I)
            if isinstance(sparsity, Pattern):
                mask = sparsity.mask(scores)
            else:
                mask = prune_lowest_in_rows(scores, round(sparsity * scores.shape[1]))
            scores.square_()
            pruned.append(weight.masked_fill(mask, 0.0))
            errors.append(scores[mask].sum() / scores.sum().clamp(min=1e-30))
        return Pruning(pruned, errors, "output (diagonal)")
