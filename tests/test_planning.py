from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fxcalib.errors import PlanError
from fxcalib.modifiers.base import Needs
from fxcalib.planning import Part, Plan, Step, free, make_plan, naive_plan, prune

GOLDEN = Path(__file__).parent / "golden"


def chain(layers: int) -> list[Part]:
    """A decoder: each layer reads the hidden states before it and the rotary table that the first one makes."""
    parts = [Part(0, frozenset({"embed", "layers.0"}), ("input_ids",), ("rotary", "h0"))]
    for k in range(1, layers):
        parts.append(Part(k, frozenset({f"layers.{k}"}), ("rotary", f"h{k - 1}"), (f"h{k}",)))
    return [*parts, Part(layers, frozenset({"head"}), (f"h{layers - 1}",), ())]


def needs(*names: str, observed: bool = True) -> Needs:
    return Needs(frozenset(names) if observed else frozenset(), frozenset(names))


LAYERS = [f"layers.{k}" for k in range(3)]
PLANS = {
    "gptq": make_plan(chain(3), [needs(*LAYERS)], ("input_ids", "attention_mask")),
    "gptq_on_an_accelerator": make_plan(chain(3), [needs(*LAYERS)], ("input_ids",), resident=False),
    "weight_only": make_plan(chain(3), [needs(*LAYERS, observed=False)], ("input_ids",)),
    "last_layer_only": make_plan(chain(3), [needs("layers.2")], ("input_ids",)),
    "observed_but_not_changed": make_plan(chain(2), [Needs(frozenset({"layers.0", "layers.1"}))], ("input_ids",)),
    "one_after_another": make_plan(chain(2), [needs("layers.0"), needs("layers.0", "layers.1")], ("input_ids",)),
    "one_pass": make_plan(chain(3), [needs(*LAYERS)], ("input_ids",), propagate_error=False),
    "side_by_side": make_plan(chain(2), [needs("layers.0"), needs("layers.1", "head")], ("input_ids",)),
}


@pytest.mark.parametrize("name", PLANS)
def test_golden(name: str) -> None:
    path = GOLDEN / f"plan_{name}.txt"
    text = f"{PLANS[name]}\n"
    if "FXCALIB_UPDATE_GOLDEN" in os.environ:
        path.write_text(text)
    assert text == path.read_text()


def test_weight_only_quantization_passes_over_no_data() -> None:
    assert PLANS["weight_only"].passes == 0


def test_without_error_propagation_every_subgraph_is_run_once() -> None:
    assert PLANS["one_pass"].passes == 3


def test_a_module_outside_of_all_subgraphs_is_refused() -> None:
    with pytest.raises(PlanError, match="no subgraph holds adapter: it cannot be calibrated"):
        make_plan(chain(2), [needs("layers.0", "adapter")], ("input_ids",))


def test_the_last_subgraph_is_never_propagated() -> None:
    assert [s.kind for s in PLANS["gptq"].steps if s.subgraph == 2] == ["calibrate", "commit"]
    assert not [s for s in PLANS["gptq"].steps if s.subgraph == 3]


def test_everything_is_freed_exactly_once() -> None:
    for plan in PLANS.values():
        freed = [name for step in plan.steps for name in step.frees]
        assert len(freed) == len(set(freed))
        written = {name for step in plan.steps for name in step.writes}
        if plan.passes:
            assert set(freed) == written | set(plan.inputs)


def test_passes_only_remove_steps_and_values() -> None:
    naive = naive_plan(chain(3), [needs(*LAYERS)], ("input_ids",))
    assert len(prune(naive).steps) < len(naive.steps)
    assert free(prune(naive)).passes == prune(naive).passes


def test_a_wrong_schedule_is_printed_with_the_wrong_step_marked() -> None:
    plan = PLANS["gptq"]
    swapped = replace(plan, steps=(plan.steps[2], *plan.steps[:2], *plan.steps[3:]))
    with pytest.raises(PlanError) as caught:
        swapped.verify()
    wrong = [line for line in str(caught.value).splitlines() if "<-- ERROR HERE" in line]
    assert len(wrong) == 1
    assert "calibrate" in wrong[0]
    assert "input_ids" in str(caught.value)
    with pytest.raises(PlanError, match="frees nothing_such, which is not there"):
        Plan((Step("calibrate", 0, frees=("nothing_such",)),), 1, ()).verify()
