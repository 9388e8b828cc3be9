import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcalib.errors import FxcalibError
from fxcalib.math.hessian import Hessian
from fxcalib.math.ranges import MinMax
from fxcalib.modifiers.sharing import InputStatistics, SharedInputs

WIDTH = 3


def make() -> InputStatistics:
    return InputStatistics(Hessian(WIDTH, torch.device("cpu")), MinMax())


def see(shared: SharedInputs, name: str, inputs: torch.Tensor, batch: int, recipe: str = "") -> None:
    shared.see(name, recipe, make, inputs, None, batch)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2)), max_size=8),
        min_size=1,
        max_size=5,
    )
)
def test_statistics_equal_those_collected_one_by_one(calls: list[list[tuple[str, int]]]) -> None:
    """Any modules reading any tensors in any order, several times a batch or never."""
    shared, alone = SharedInputs(), {}
    for batch, reads in enumerate(calls):
        tensors = [torch.randn(5, WIDTH) for _ in range(3)]
        for name, which in reads:
            see(shared, name, tensors[which], batch)
            alone.setdefault(name, make()).add(tensors[which], None, batch)
    groups = shared.finish()
    assert sorted(name for names, _ in groups for name in names) == sorted(alone)
    for names, statistics in groups:
        for name in names:
            assert statistics.hessian is not None and alone[name].hessian is not None
            assert torch.allclose(statistics.hessian.full(), alone[name].hessian.full(), atol=1e-4)
            assert statistics.range is not None and alone[name].range is not None
            assert statistics.range.extremes() == alone[name].range.extremes()
            assert statistics.batches == alone[name].batches


def test_modules_fed_one_tensor_share_one_statistic() -> None:
    shared = SharedInputs()
    for batch in range(3):
        inputs, other = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
        for name in "qkv":
            see(shared, name, inputs, batch)
        see(shared, "o", other, batch)
    assert [names for names, _ in shared.finish()] == [["k", "q", "v"], ["o"]]


def test_equal_values_in_different_tensors_are_not_taken_for_one() -> None:
    shared = SharedInputs()
    inputs = torch.randn(4, WIDTH)
    see(shared, "a", inputs, 0)
    see(shared, "b", inputs.clone(), 0)
    assert len(shared.finish()) == 2


def test_modules_part_where_their_inputs_do() -> None:
    shared = SharedInputs()
    batches = [torch.randn(4, WIDTH) for _ in range(3)]
    for name in "ab":
        see(shared, name, batches[0], 0)
    see(shared, "a", batches[1], 1)
    see(shared, "b", batches[2], 1)
    first, second = (statistics for _, statistics in shared.finish())
    assert first.hessian is not None and second.hessian is not None
    assert torch.allclose(first.hessian.full(), sum(x.T @ x for x in batches[:2]))
    assert torch.allclose(second.hessian.full(), batches[0].T @ batches[0] + batches[2].T @ batches[2])


def test_an_input_changed_in_place_is_another_input() -> None:
    shared = SharedInputs()
    inputs = torch.ones(4, WIDTH)
    see(shared, "a", inputs, 0)
    inputs.mul_(2)
    see(shared, "b", inputs, 0)
    (_, first), (_, second) = shared.finish()
    assert first.hessian is not None and second.hessian is not None
    assert torch.equal(second.hessian.full(), 4 * first.hessian.full())


def test_an_input_changed_before_all_have_read_it_is_refused() -> None:
    shared = SharedInputs()
    first = torch.ones(4, WIDTH)
    for name in "ab":
        see(shared, name, first, 0)
    second = torch.ones(4, WIDTH)
    see(shared, "a", second, 1)
    second.mul_(2)
    with pytest.raises(FxcalibError, match=r"the input of 'a' was changed in place in batch 1"):
        shared.finish()


def test_different_recipes_do_not_share() -> None:
    shared = SharedInputs()
    inputs = torch.randn(4, WIDTH)
    see(shared, "a", inputs, 0, "range")
    see(shared, "b", inputs, 0, "hessian")
    assert len(shared.finish()) == 2


def test_no_input_is_kept_alive() -> None:
    shared = SharedInputs()
    references = []
    for batch in range(3):
        inputs = torch.randn(4, WIDTH)
        references.append(weakref.ref(inputs))
        for name in "ab":
            see(shared, name, inputs, batch)
        del inputs
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_the_first_bad_batch_is_found() -> None:
    statistics = make()
    for batch, value in ((4, 1.0), (7, float("inf")), (9, float("nan"))):
        statistics.add(torch.full((2, WIDTH), value), None, batch)
    assert statistics.first_bad_batch() == 7
    assert make().first_bad_batch() is None
