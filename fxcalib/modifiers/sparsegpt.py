"""SparseGPT: weights pruned for the least error of their layer's output on the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcalib.errors import OptionError
from fxcalib.math.gptq import Factor, Unfactorable, factorize
from fxcalib.math.hessian import Hessian
from fxcalib.math.pruning import Pattern
from fxcalib.math.sparsegpt import solve
from fxcalib.modifiers.magnitude import prune_by_magnitude
from fxcalib.modifiers.owl import OWLModifier
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.sparsity_modifier import Pruning


class SparseGPTModifier(OWLModifier):
    """Prune linear modules column by column, the weights that are left making up for those that are gone.

    Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one-shot". Modules that are
    fed the same tensor share one Hessian and are solved as one stacked weight. Modules that no batch reaches are pruned
    by magnitude, with a note.

    Args:
        block_size: columns for which a mask without a structure is selected at once, and each is pruned to `sparsity`.
            It changes nothing but speed for an N:M structure.
        dampening_frac: part of the Hessian's mean diagonal that is added to its diagonal; raised, with a note, where
            the Hessian is singular.
        sparsity_profile, owl_m, owl_lmbda: as `OWLModifier` has them.
        sparsity, mask_structure, targets, ignore, sequential_targets, preserve_sparsity_mask: as `SparsityModifier` has
            them.

    Raises:
        OptionError: arguments that contradict each other or are out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        sparsity_profile: str | None = None,
        mask_structure: str = "0:0",
        owl_m: float | None = None,
        owl_lmbda: float | None = None,
        block_size: int = 128,
        dampening_frac: float = 0.01,
        targets: str | Sequence[str] = "Linear",
        ignore: str | Sequence[str] | None = None,
        sequential_targets: str | Sequence[str] | None = None,
        preserve_sparsity_mask: bool = False,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            sparsity_profile=sparsity_profile,
            mask_structure=mask_structure,
            owl_m=owl_m,
            owl_lmbda=owl_lmbda,
            targets=targets,
            ignore=ignore,
            sequential_targets=sequential_targets,
            preserve_sparsity_mask=preserve_sparsity_mask,
        )
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise OptionError(f"block_size {block_size!r} must be a whole number of columns, at least 1")
        if not isinstance(dampening_frac, (int, float)) or not 0 <= dampening_frac <= 1:
            raise OptionError(f"dampening_frac {dampening_frac!r} must be between 0 and 1; 0.01 is usual")
        self._block_size, self._dampening_frac = block_size, dampening_frac

    @property
    def makes_statistics(self) -> Callable[[Tensor], InputStatistics] | None:
        return lambda inputs: InputStatistics(Hessian(inputs.shape[-1], inputs.device))

    def prune(
        self, weights: Sequence[Tensor], sparsity: float | Pattern, statistics: InputStatistics | None
    ) -> Pruning:
        factor = self._factorize(statistics)
        if isinstance(factor, str):
            return prune_by_magnitude(weights, sparsity, (f"pruned by magnitude: {factor}",))
        rows = [len(weight) for weight in weights]
        solution = solve(
            torch.cat(list(weights)) if len(weights) > 1 else weights[0],
            factor,
            sparsity,
            parts=rows,
            block_size=self._block_size,
            keep_zeros=self._preserve,
        )
        sums = zip(torch.split(solution.error_O, rows), torch.split(solution.energy_O, rows), strict=True)
        errors = [error.sum() / energy.sum().clamp(min=1e-30) for error, energy in sums]
        return Pruning(list(torch.split(solution.weight_OI, rows)), errors, "output", factor.notes)

    def _factorize(self, statistics: InputStatistics | None) -> Factor | str:
        """The factored Hessian, or why there is none."""
        if statistics is None or statistics.hessian is None:
            return "no calibration batch reached it"
        try:
            return factorize(statistics.hessian.full(), self._dampening_frac, "given")
        except Unfactorable as error:
            return str(error)
