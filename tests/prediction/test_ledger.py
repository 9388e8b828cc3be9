"""Who holds what where, with numbers small enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace

from fxcalib.modifiers.base import Needs
from fxcalib.planning import Part, make_plan
from fxcalib.prediction.ledger import Facts, moments, moved
from fxcalib.prediction.rehearsal import Rehearsed
from fxcalib.prediction.saving import Saved
from fxcalib.prediction.solving import Committed

PARTS = [
    Part(0, frozenset({"a"}), ("ids",), ("h0",)),
    Part(1, frozenset({"b"}), ("h0",), ("h1",)),
    Part(2, frozenset({"head"}), ("h1",), ()),
]
NEEDS = [Needs(frozenset({"a", "b"}), frozenset({"a", "b"}))]
ONE_PASS = Rehearsed(working_bytes=7, statistics_bytes=5)
FACTS = Facts(
    weights=1000,
    called=[300, 200, 100],
    values={"ids": (1, 4), "h0": (10, 40), "h1": (20, 80)},
    rehearsed={(k, kind): ONE_PASS for k in (0, 1) for kind in ("calibrate", "propagate")},
    committed={},
    saved=Saved(disk_bytes=500, held_bytes=250, working_bytes=30),
    on_device=False,
    stored_on_device=False,
)


def test_a_run_on_the_cpu_holds_all_on_the_host() -> None:
    plan = make_plan(PARTS, NEEDS, ("ids",))
    commits = {i: Committed(working_bytes=50) for i, s in enumerate(plan.steps) if s.kind == "commit"}
    found = moments(plan, PARTS, replace(FACTS, committed=commits))
    assert [(m.name, m.host_bytes) for m in found] == [
        ("load", 1000),
        ("calibrate subgraph 0", 1000 + 4 + 5 + 7),
        ("commit subgraph 0", 1000 + 4 + 5 + 50),
        ("propagate subgraph 0", 1000 + 4 + 40 + 7),
        ("calibrate subgraph 1", 1000 + 4 + 40 + 5 + 7),
        ("commit subgraph 1", 1000 + 4 + 5 + 50),
        ("save", 1000 + 4 + 250 + 30),
    ]
    assert not any(m.device for m in found)
    assert moved(plan, FACTS).host_to_device == 0


def test_an_accelerator_holds_one_subgraph_and_one_batch() -> None:
    plan = make_plan(PARTS, NEEDS, ("ids",), resident=False)
    commits = {i: Committed(working_bytes=50) for i, s in enumerate(plan.steps) if s.kind == "commit"}
    facts = replace(FACTS, committed=commits, on_device=True, workspace=3)
    by_name = {m.name: m for m in moments(plan, PARTS, facts)}
    assert by_name["propagate subgraph 0"].device == {
        "weights": 300 + 200,
        "working": 7,
        "copies": 4 * 1 + 3 * 10,
        "workspace": 3,
    }
    assert by_name["propagate subgraph 0"].host == {"weights": 1000, "batches": 4, "stored": 40}
    assert by_name["commit subgraph 1"].device_bytes == 200 + 5 + 50 + 3
    assert by_name["save"].host_bytes == 1000 + 4 + 250 + 30
    crossed = moved(plan, facts)
    assert (crossed.host_to_device, crossed.device_to_host) == (300 + 200 + 4 + 4 + 40, 300 + 200 + 40)
    kept = moments(plan, PARTS, replace(facts, stored_on_device=True))
    assert {m.name: m for m in kept}["propagate subgraph 0"].device["stored"] == 40
