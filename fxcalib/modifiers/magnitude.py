"""Magnitude pruning: the smallest weights become zero. No data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxcalib.errors import OptionError
from fxcalib.math.pruning import Pattern, prune_lowest
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.sparsity_modifier import Pruning, SparsityModifier


class MagnitudePruningModifier(SparsityModifier):
    """Set the weights of least magnitude of each module to zero; needs no data.

    Han et al. 2015, "Learning both weights and connections for efficient neural networks".

    Args:
        final_sparsity: the same as `sparsity`, the name that schedules of pruning while training have for it.
        init_sparsity: where such a schedule begins; all is pruned at once here, so it may not be above the final one.
        sparsity, mask_structure, targets, ignore, sequential_targets, preserve_sparsity_mask: as `SparsityModifier` has
            them. Without a structure the smallest weights of the whole module go.

    Raises:
        OptionError: arguments that contradict each other or are out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        init_sparsity: float | None = None,
        final_sparsity: float | None = None,
        mask_structure: str = "0:0",
        targets: str | Sequence[str] = "Linear",
        ignore: str | Sequence[str] | None = None,
        sequential_targets: str | Sequence[str] | None = None,
        preserve_sparsity_mask: bool = False,
    ) -> None:
        if sparsity is not None and final_sparsity is not None and sparsity != final_sparsity:
            raise OptionError(
                f"sparsity {sparsity!r} and final_sparsity {final_sparsity!r} are the same option; give one"
            )
        final = final_sparsity if sparsity is None else sparsity
        super().__init__(
            sparsity=final,
            mask_structure=mask_structure,
            targets=targets,
            ignore=ignore,
            sequential_targets=sequential_targets,
            preserve_sparsity_mask=preserve_sparsity_mask,
        )
        if init_sparsity is not None and not (final is not None and 0 <= init_sparsity <= final):
            raise OptionError(f"init_sparsity {init_sparsity!r} must be between 0 and the final sparsity {final!r}")

    @property
    def makes_statistics(self) -> Callable[[Tensor], InputStatistics] | None:
        return None

    def prune(
        self, weights: Sequence[Tensor], sparsity: float | Pattern, statistics: InputStatistics | None
    ) -> Pruning:
        return prune_by_magnitude(weights, sparsity)


def prune_by_magnitude(weights: Sequence[Tensor], sparsity: float | Pattern, notes: tuple[str, ...] = ()) -> Pruning:
    """Prune the smallest values of each weight (O, I)."""
    pruned, errors = [], []
    for weight in weights:
        magnitudes = weight.abs()
        if isinstance(sparsity, Pattern):
            mask = sparsity.mask(magnitudes)
        else:
            mask = prune_lowest(magnitudes, round(sparsity * magnitudes.numel()))
        squares = magnitudes.float().square_()
        pruned.append(weight.masked_fill(mask, 0.0))
        errors.append(squares[mask].sum() / squares.sum().clamp(min=1e-30))
    return Pruning(pruned, errors, "weight", notes)
