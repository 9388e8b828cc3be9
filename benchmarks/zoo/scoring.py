"""How exactly a tool cuts and runs a model, held against the model itself."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers

from benchmarks.zoo import outputs
from benchmarks.zoo.architectures import Architecture
from benchmarks.zoo.building import EAGER, SDPA, Case, Reference, build, has_sdpa, reference
from benchmarks.zoo.errors import NotBuilt, cause
from benchmarks.zoo.targets import expected_calls
from benchmarks.zoo.tools import Cut, Tool

DEFAULT, DECODER, LINEAR = "default", "decoder", "linear"

DECODER_ONLY = "causal_lm"
"""The category that is scored with linear modules as targets too."""


@dataclass(frozen=True)
class Score:
    """How one tool does with one set of targets and one implementation of attention."""

    targets: str
    attention: str
    traced: bool = False
    """It made subgraphs at all."""
    alone: bool = False
    """Every target that the model calls is there as often as it is called, each in a subgraph of its own."""
    exact: bool = False
    """The traced batch gives the model's bits."""
    others: bool = False
    """So do batches of other sizes and paddings, and an unpadded row."""
    same_type: bool = False
    """Every output has the model's types."""
    wrong: bool = False
    """Some batch ran without an error and gave other bits."""
    restored: bool = True
    """Afterwards the model itself still gives its bits."""
    retraces: int = 0
    """Batches that had to be traced anew."""
    seconds: float = 0.0
    """Of processor time."""
    cause: str | None = None
    """The first thing that went wrong."""

    @property
    def full(self) -> bool:
        """Nothing is amiss."""
        return self.traced and self.alone and self.exact and self.others and self.same_type


@dataclass(frozen=True)
class Outcome:
    """What one batch came to."""

    exact: bool
    ran: bool
    same_type: bool
    cause: str | None


def score(case: Case, tool: Tool, targets: str, attention: str) -> Score:
    """Score `tool` on `case` with one of its sets of targets."""
    classes: tuple[str, ...] = getattr(case.targets, targets)
    made = Score(targets, attention)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            cut = tool.cut(case.model, outputs.copied(case.batches[0]), classes)
        except Exception as error:
            made = replace(made, cause=f"tracing: {cause(error)}")
        else:
            made = score_cut(case, cut, classes, made)
    return replace(made, seconds=round(time.process_time() - started, 3), restored=_restored(case))


def score_cut(case: Case, cut: Cut, classes: Sequence[str], made: Score) -> Score:
    """Fill in `made` for a model that has been cut at `classes`."""
    expected = expected_calls(case.model, classes, case.batches[0], cut.innermost)
    outside = _misplaced(case, cut.calls, expected)
    outcomes = [run(cut, batch, kept) for batch, kept in zip(case.batches, case.references, strict=True)]
    causes = [outside] + [o.cause and f"batch {index}: {o.cause}" for index, o in enumerate(outcomes)]
    return replace(
        made,
        traced=True,
        alone=outside is None,
        exact=outcomes[0].exact,
        others=all(outcome.exact for outcome in outcomes[1:]),
        same_type=all(outcome.same_type for outcome in outcomes),
        wrong=any(outcome.ran and not outcome.exact for outcome in outcomes),
        retraces=cut.retraces,
        cause=next(filter(None, causes), None),
    )


def run(cut: Cut, batch: Mapping[str, Any], expected: Reference) -> Outcome:
    """Run one batch through the subgraphs and compare all that comes out with what the model returns."""
    try:
        torch.manual_seed(0)
        result = cut.run(outputs.copied(batch))
        wanted, found = expected.tensors, outputs.tensors(result)
        if found and not cut.whole_output:
            wanted, found = ({"main output": outputs.main_tensor(every)} for every in (wanted, found))
        different = outputs.difference(wanted, found)
        types = outputs.structure(result)
    except Exception as error:
        return Outcome(exact=False, ran=False, same_type=False, cause=cause(error))
    same_type = types == expected.structure
    if different is None and not same_type:
        path = next(p for p in {**expected.structure, **types} if types.get(p) != expected.structure.get(p))
        types_of = f"{path or 'the output'} is {types.get(path)} instead of {expected.structure.get(path)}"
        return Outcome(True, True, False, types_of)
    return Outcome(different is None, True, same_type, different)


def _misplaced(case: Case, calls: Sequence[Sequence[int]], expected: Counter[int]) -> str | None:
    names = {id(module): name for name, module in case.model.named_modules()}
    together = next((subgraph for subgraph in calls if len(subgraph) > 1), None)
    if together is not None:
        return f"one subgraph calls {', '.join(names[key] for key in together[:4])}"
    found = Counter(key for subgraph in calls for key in subgraph)
    if found == expected:
        return None
    key = next(key for key in {**expected, **found} if found[key] != expected[key])
    return f"{names[key]} is called {expected[key]} times by the model and {found[key]} times by the subgraphs"


def _restored(case: Case) -> bool:
    try:
        again = reference(case.model, case.batches[0])
    except Exception:
        return False
    return not case.deterministic or outputs.difference(case.references[0].tensors, again.tensors) is None


def records(architecture: Architecture, tool: Tool) -> Iterator[dict[str, Any]]:
    """Build and score one architecture. Yields its record as plain values, again and again, as it grows."""
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {"name": architecture.name, "category": architecture.category, "built": False}
    try:
        case = build(architecture)
    except NotBuilt as refused:
        yield {**record, "stage": refused.stage, "reason": str(refused)}
        return
    record.update(
        built=True,
        parameters=case.parameters,
        deterministic=case.deterministic,
        sensitive=case.sensitive,
        batches=len(case.batches),
        targets=list(case.targets.default),
        decoder=list(case.targets.decoder),
        scores=[],
    )
    yield record
    for attention in (EAGER, SDPA):
        if attention == SDPA:
            if not has_sdpa(case.model):
                break
            try:
                case = build(architecture, SDPA)
            except NotBuilt as refused:
                record["sdpa"] = f"{refused.stage}: {refused}"
                break
        for made in _all_sets(architecture, case, tool, attention):
            record["scores"].append({**asdict(made), "full": made.full})
            yield record
    yield {**record, "complete": True}


def _all_sets(architecture: Architecture, case: Case, tool: Tool, attention: str) -> Iterator[Score]:
    first = score(case, tool, DEFAULT, attention)
    yield first
    if case.targets.default == case.targets.decoder:
        yield replace(first, targets=DECODER, seconds=0.0)
    else:
        yield score(case if first.restored else build(architecture, attention), tool, DECODER, attention)
    if architecture.category == DECODER_ONLY and attention == EAGER:
        yield score(build(architecture, attention), tool, LINEAR, attention)
