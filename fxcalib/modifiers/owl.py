"""Outlier weighed layerwise sparsity: layers whose scores hold more outliers are pruned less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxcalib.errors import OptionError
from fxcalib.math.pruning import Pattern, SquareSums, layer_sparsities, outlier_ratio, wanda_scores
from fxcalib.modifiers.base import Modifier, ModuleResult, Needs, Scope
from fxcalib.modifiers.sharing import InputStatistics
from fxcalib.modifiers.sparsity_modifier import SparsityModifier, observed_inputs

_MULTIPLE = 5.0
_DEVIATION = 0.08


class OWLModifier(SparsityModifier):
    """A pruning modifier whose sparsity may differ from layer to layer.

    Yin et al. 2023, "Outlier weighed layerwise sparsity (OWL): a missing secret sauce for pruning LLMs to high
    sparsity". The outlier ratios are of the original model, so its own pass over the data goes before all others. A
    layer is an item of the outermost list of modules, such as a decoder layer.

    Args:
        sparsity_profile: `owl`, or None for the same sparsity everywhere.
        owl_m: scores above this multiple of their layer's mean are outliers; 5 unless told.
        owl_lmbda: how far the sparsity of a layer may be from `sparsity` either way; 0.08 unless told.
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
        targets: str | Sequence[str] = "Linear",
        ignore: str | Sequence[str] | None = None,
        sequential_targets: str | Sequence[str] | None = None,
        preserve_sparsity_mask: bool = False,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            mask_structure=mask_structure,
            targets=targets,
            ignore=ignore,
            sequential_targets=sequential_targets,
            preserve_sparsity_mask=preserve_sparsity_mask,
        )
        self._deviation = _DEVIATION if owl_lmbda is None else owl_lmbda
        self._by_layer: dict[str, float] = {}
        self.survey: OutlierSurvey | None = None
        multiple = _MULTIPLE if owl_m is None else owl_m
        if sparsity_profile is None:
            if owl_m is not None or owl_lmbda is not None:
                raise OptionError(
                    "owl_m and owl_lmbda are settings of sparsity_profile='owl'; give that too, or neither"
                )
            return
        if not isinstance(sparsity_profile, str) or sparsity_profile.lower() != "owl":
            raise OptionError(f"unknown sparsity_profile {sparsity_profile!r}: choose 'owl', or None")
        if isinstance(self._sparsity, Pattern):
            raise OptionError(
                f"sparsity_profile 'owl' gives each layer a sparsity of its own, but mask_structure '{self._sparsity}' "
                "has one; use mask_structure='0:0', or leave the profile out"
            )
        for name, value in (("owl_m", multiple), ("owl_lmbda", self._deviation)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise OptionError(f"{name} {value!r} must be a number above 0")
        if not self._deviation <= self._sparsity < 1 - self._deviation:
            raise OptionError(
                f"owl_lmbda {self._deviation:g} takes layers of sparsity {self._sparsity:g} out of [0, 1); lower it"
            )
        self.survey = OutlierSurvey(multiple, self.sequential_targets)

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._by_layer = {}
        if self.survey is not None:
            self.survey.of(model, self._pruned)

    def sparsity_of(self, name: str) -> float | Pattern:
        if self.survey is None or isinstance(self._sparsity, Pattern):
            return self._sparsity
        if not self._by_layer:
            self._by_layer = self._distributed(self.survey, self._sparsity)
        return self._by_layer[self.survey.layers[name]]

    def _distributed(self, survey: OutlierSurvey, sparsity: float) -> dict[str, float]:
        ratios, sizes = survey.ratios(), dict.fromkeys(survey.layers.values(), 0)
        for name, layer in survey.layers.items():
            sizes[layer] += self._pruned[name].weight.numel()
        found = layer_sparsities(list(ratios.values()), [sizes[layer] for layer in ratios], sparsity, self._deviation)
        # a layer that no batch reached has no ratio
        return {**dict.fromkeys(sizes, sparsity), **dict(zip(ratios, found, strict=True))}


class OutlierSurvey(Modifier):
    """Finds the outlier ratio of each layer of the original model; it changes nothing."""

    def __init__(self, multiple: float, sequential_targets: Sequence[str] | None) -> None:
        self.sequential_targets = sequential_targets
        self._multiple = multiple
        self._modules: Mapping[str, nn.Linear] = {}
        self.layers: dict[str, str] = {}
        """Name of each module that is looked at -> that of its layer."""
        self._waiting: dict[str, set[str]] = {}
        self._squares: dict[str, Tensor] = {}
        self._ratios: dict[str, Tensor] = {}

    def of(self, model: nn.Module, modules: Mapping[str, nn.Linear]) -> None:
        """Begin a survey of these modules, by qualified name."""
        self._modules = modules
        self.layers = {name: _layer_of(model, name) for name in modules}
        self._waiting = {layer: {n for n, own in self.layers.items() if own == layer} for layer in self.layers.values()}
        self._squares, self._ratios = {}, {}

    def ratios(self) -> dict[str, float]:
        """Layer -> outlier ratio, but for those that no batch reached."""
        if not self._ratios:
            raise OptionError(
                "sparsity_profile 'owl' needs a look at the whole original model before any of it is pruned; "
                "run the modifier in one of fxcalib's pipelines, with data"
            )
        home = next(iter(self._ratios.values())).device
        values = torch.stack([ratio.to(home) for ratio in self._ratios.values()]).tolist()
        return dict(zip(self._ratios, values, strict=True))

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(observed=frozenset(self._modules))

    def attach(self, model: nn.Module) -> None:
        pass

    @contextmanager
    def observe(self, scope: Scope) -> Iterator[None]:
        names = {name: module for name, module in scope.modules.items() if name in self._modules}
        with observed_inputs(scope, names, square_sums) as inputs:
            yield
        self._squares.update({n: s.squares.sum_I for n, s in inputs.items() if s.squares is not None})
        for layer in dict.fromkeys(self.layers[name] for name in names):
            self._waiting[layer] -= names.keys()
            if not self._waiting[layer]:
                self._finish(layer)

    def commit(self, scope: Scope) -> list[ModuleResult]:
        return []

    def detach(self, model: nn.Module) -> None:
        self._squares = {}

    def _finish(self, layer: str) -> None:
        """The ratio of a layer whose modules have all been observed, while most weights are where they compute."""
        scores = []
        for name in (name for name, own in self.layers.items() if own == layer and name in self._squares):
            weight = self._modules[name].weight.detach()
            scores.append(wanda_scores(weight, self._squares.pop(name).to(weight.device)))
        if scores:
            home = scores[0].device
            self._ratios[layer] = outlier_ratio([each.to(home) for each in scores], self._multiple)


def square_sums(inputs: Tensor) -> InputStatistics:
    """Statistics of nothing but the norm of each channel of inputs (..., I)."""
    return InputStatistics(squares=SquareSums(inputs.shape[-1], inputs.device))


def _layer_of(model: nn.Module, name: str) -> str:
    """The outermost module above `name` that is an item of a list, or `name` itself where there is none."""
    parent, path = model, ""
    for part in name.split("."):
        path = f"{path}.{part}" if path else part
        if isinstance(parent, nn.ModuleList):
            return path
        parent = parent.get_submodule(part)
    return name
