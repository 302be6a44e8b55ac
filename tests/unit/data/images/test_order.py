from __future__ import annotations

import numpy as np
import pytest

from matformer_dist.data.images.order import Order, held_out, permutation, spread


def epoch(order: Order, number: int) -> list[int]:
    return [order(number * order.size + position) for position in range(order.size)]


def test_every_epoch_has_all_in_an_order_of_its_own() -> None:
    order = Order(50, 7)
    found = [epoch(order, number) for number in range(4)]
    assert all(sorted(one) == list(range(50)) for one in found)
    assert len({tuple(one) for one in found}) == 4
    assert found[2] == epoch(Order(50, 7), 2)  # from the middle, as after a resumption
    assert found[0] == epoch(order, 0)  # and back
    assert found[0] != epoch(Order(50, 8), 0)
    assert [Order(1, 7)(sample) for sample in range(3)] == [0, 0, 0]


def test_orders_stay_what_they_are() -> None:
    """A run that goes on with another version of torch must meet the same images."""
    assert [Order(1000, 1234)(sample) for sample in (0, 1, 2, 1000, 1001)] == [
        569,
        756,
        681,
        203,
        399,
    ]


@pytest.mark.parametrize("starts", [[0], [0, 4, 8, 9], [*range(0, 200, 7)]])
def test_groups_are_mixed_eight_at_a_time(starts: list[int]) -> None:
    size = 200
    order = Order(size, 3, np.array(starts))
    found = epoch(order, 0)
    assert sorted(found) == list(range(size)) and found != sorted(found)
    assert found != epoch(order, 1)
    group_of = np.searchsorted(starts, found, side="right") - 1
    lengths = np.diff([*starts, size])
    position = 0
    seen: set[int] = set()
    while position < size:  # each window is all of eight groups, or of those that are left
        groups: list[int] = []
        for group in group_of[position:]:
            if group not in groups and len(groups) < 8:
                groups.append(int(group))
        length = int(lengths[groups].sum())
        assert set(group_of[position : position + length]) == set(groups)
        assert not seen & set(groups)
        seen |= set(groups)
        position += length
    assert len(seen) == len(starts)
    if len(starts) > 8:
        assert sorted(seen) != [int(group) for group in dict.fromkeys(group_of)]


def test_held_out_samples_are_a_share() -> None:
    train, validation = held_out(1000, 0.02, 5)
    assert len(validation) == 20
    assert sorted([*train, *validation]) == list(range(1000))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    assert 300 < validation.mean() < 700  # from all of it
    assert np.array_equal(held_out(1000, 0.02, 5)[1], validation)
    assert not np.array_equal(held_out(1000, 0.02, 6)[1], validation)


def test_few_of_many_are_spread_evenly() -> None:
    assert spread(10, 20).tolist() == spread(10, 10).tolist() == list(range(10))
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(1_000_000, 3).tolist() == [0, 333333, 666666]
    assert spread(0, 3).tolist() == []


def test_permutations_differ_by_their_key() -> None:
    found = {tuple(permutation(20, *key)) for key in [("a", 1), ("b", 1), ("a", 2), ("a", 1, 0)]}
    assert len(found) == 4
