"""What is counted of operations, on real tensors whose sizes are known."""

from __future__ import annotations

import torch

from fxcalib.prediction.tracking import Allocations


def test_live_and_peak_bytes_follow_what_is_dropped() -> None:
    before = torch.ones(100)
    tracker = Allocations(1)
    tracker.ignore(before)
    with tracker:
        first = before + 1
        assert (tracker.live, tracker.peak) == (400, 400)
        second = first.double()
        view = second[:10]
        del first
        assert (tracker.live, tracker.peak) == (800, 1200)
        del second
        assert tracker.live == 800  # the view keeps it
        del view
    assert (tracker.live, tracker.peak) == (0, 1200)


def test_changes_in_place_take_no_memory() -> None:
    tracker = Allocations(1)
    with tracker:
        made = torch.zeros(10)
        made.add_(1).mul_(2)
        assert tracker.peak == 40


def test_operations_of_matrix_products_in_place_or_not() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    tracker = Allocations(1)
    with tracker:
        c = a @ b
        assert tracker.flops == tracker.float32_flops == 2 * 3 * 5 * 7
        c.addmm_(a, b)
        assert tracker.flops == 2 * 2 * 3 * 5 * 7
        a.bfloat16() @ b.bfloat16()
    assert tracker.flops == 3 * tracker.float32_flops // 2


def test_traffic_counts_reads_and_writes_but_no_views() -> None:
    a = torch.ones(10)
    tracker = Allocations(1)
    with tracker:
        tracker.ignore(a)
        b = a.view(2, 5).t()
        assert tracker.traffic == 0
        b + 1
    assert tracker.traffic == 80
