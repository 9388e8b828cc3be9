import torch

from fxcalib.math.granularity import Granularity

WEIGHT = torch.arange(6 * 8, dtype=torch.float32).reshape(6, 8)


def test_tables_hold_the_elements_that_share_a_scale() -> None:
    assert Granularity("tensor").table(WEIGHT).shape == (1, 48)
    assert torch.equal(Granularity("channel").table(WEIGHT)[2], WEIGHT[2])
    assert torch.equal(Granularity("group", columns=4).table(WEIGHT)[5], WEIGHT[2, 4:])
    block = Granularity("block", columns=4, rows=4)
    assert block.shape(WEIGHT.shape) == (2, 2)
    assert torch.equal(block.table(WEIGHT)[1].reshape(4, 4), WEIGHT[:4, 4:])
    assert torch.equal(block.table(WEIGHT)[2].reshape(4, 4)[:2], WEIGHT[4:, :4]), "padded below"
    assert not block.table(WEIGHT)[2].reshape(4, 4)[2:].any()


def test_importance_rows_repeat_over_the_table() -> None:
    importance = torch.arange(8, dtype=torch.float32)
    for granularity in (
        Granularity("tensor"),
        Granularity("channel"),
        Granularity("group", columns=2),
        Granularity("block", columns=4, rows=3),
    ):
        rows = granularity.importance(importance, WEIGHT.shape)
        whole = granularity.table(importance.expand(6, 8))
        assert torch.equal(rows.repeat(len(whole) // len(rows), 1), whole)


def test_expanded_scales_meet_their_columns() -> None:
    for granularity in (
        Granularity("tensor"),
        Granularity("channel"),
        Granularity("group", columns=4),
        Granularity("block", columns=4, rows=4),
    ):
        shape = granularity.shape(WEIGHT.shape)
        scale = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        expanded = granularity.expand(scale, WEIGHT.shape)
        columns = granularity.group_of_column(8)
        by_element = torch.stack([expanded[:, column] for column in columns], 1)
        # Every row of a table of scales must be constant and equal to the stored scale.
        table = granularity.table(by_element)
        wanted = scale.flatten()[:, None].expand(table.shape)
        real = granularity.table(torch.ones_like(WEIGHT)) > 0
        assert torch.equal(table[real], wanted[real])
