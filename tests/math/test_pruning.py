import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.math.pruning import (
    Pattern,
    SquareSums,
    layer_sparsities,
    outlier_ratio,
    prune_lowest,
    prune_lowest_in_rows,
    wanda_scores,
)


def lowest(values: list[float], count: int) -> list[bool]:
    """Positions of the `count` lowest values, those with a lower index first among equals."""
    chosen = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    return [i in chosen for i in range(len(values))]


# few distinct values, so that most thresholds are tied
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.0]), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None)
@given(values=SCORES, count=st.integers(0, 24), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_exactly_the_lowest_are_pruned(values: list[float], count: int, dtype: torch.dtype) -> None:
    scores = torch.tensor(values, dtype=dtype).reshape(4, 6)
    assert prune_lowest(scores, count).flatten().tolist() == lowest(values, count)


@settings(max_examples=60, deadline=None)
@given(values=SCORES, count=st.integers(0, 6))
def test_rows_are_pruned_each_by_itself(values: list[float], count: int) -> None:
    mask = prune_lowest_in_rows(torch.tensor(values).reshape(4, 6), count)
    assert mask.flatten().tolist() == [p for k in range(0, 24, 6) for p in lowest(values[k : k + 6], count)]


@settings(max_examples=60, deadline=None)
@given(values=SCORES, pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 12)]))
def test_patterns_keep_the_highest_of_every_run(values: list[float], pattern: Pattern) -> None:
    mask = pattern.mask(torch.tensor(values).reshape(24 // pattern.run, pattern.run))
    pruned = pattern.run - pattern.kept
    runs = [lowest(values[k : k + pattern.run], pruned) for k in range(0, 24, pattern.run)]
    assert mask.flatten().tolist() == [p for run in runs for p in run]
    assert pattern.fits(torch.ones(mask.shape).masked_fill(mask, 0))
    assert not pattern.fits(torch.ones(mask.shape))


def test_a_pattern_says_how_sparse_it_is() -> None:
    assert (str(Pattern(2, 4)), Pattern(2, 4).sparsity, Pattern(1, 8).sparsity) == ("2:4", 0.5, 0.875)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_scores_equal_the_paper_in_float64(dtype: torch.dtype) -> None:
    weight, batches = torch.randn(6, 8, dtype=dtype), [torch.randn(2, 5, 8, dtype=dtype) * 3 for _ in range(3)]
    sums = SquareSums(8, torch.device("cpu"))
    for batch in batches:
        sums.add(batch)
    copy = sums.clone()
    copy.add(batches[0])
    rows = torch.cat(batches).reshape(-1, 8).double()
    expected = weight.double().abs() * rows.norm(dim=0)
    assert torch.allclose(wanda_scores(weight, sums.sum_I).double(), expected, rtol=1e-5)
    assert not torch.equal(copy.sum_I, sums.sum_I)


def test_outlier_ratios_equal_the_paper_in_float64() -> None:
    scores = [torch.rand(20, 30).pow(6), torch.rand(7, 30).pow(6)]
    together = torch.cat([each.flatten() for each in scores]).double()
    for multiple in (1, 3, 5):
        expected = float((together > multiple * together.mean()).double().mean())
        assert float(outlier_ratio(scores, multiple)) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 1000)), min_size=1, max_size=12),
    sparsity=st.sampled_from([0.5, 0.7]),
)
def test_layers_with_more_outliers_are_pruned_less(layers: list[tuple[float, int]], sparsity: float) -> None:
    ratios, sizes = zip(*layers, strict=True)
    found = layer_sparsities(ratios, sizes, sparsity, 0.08)
    average = sum(each * size for each, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert average == pytest.approx(sparsity)
    assert all(sparsity - 0.08 - 1e-9 <= each <= sparsity + 0.08 + 1e-9 for each in found)
    assert all(
        found[i] <= found[j] + 1e-9 for i in range(len(found)) for j in range(len(found)) if ratios[i] > ratios[j]
    )
    spread = max(abs(each - sparsity) for each in found)
    assert math.isclose(spread, 0.08, abs_tol=1e-9) or spread == 0


def test_layers_without_a_difference_are_pruned_alike() -> None:
    assert layer_sparsities([0.1, 0.1], [10, 20], 0.6, 0.1) == (0.6, 0.6)
    assert layer_sparsities([0.02, 0.04, 0.06], [5, 5, 5], 0.5, 0.1) == pytest.approx((0.6, 0.5, 0.4))
