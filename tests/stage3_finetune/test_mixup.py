"""Mixup: pairs and shares by names alone."""

import numpy as np
import torch

from stage3_finetune.mixup import draw_mixup, mix

IDS = [f"{index}.png" for index in range(64)]


def test_a_draw_is_a_function_of_seed_ids_and_epoch() -> None:
    first, again = (draw_mixup(IDS, 3, seed=1, alpha=0.4) for _ in range(2))
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    for other in (draw_mixup(IDS, 4, seed=1, alpha=0.4), draw_mixup(IDS, 3, seed=2, alpha=0.4)):
        assert other[0] != first[0]
        assert not np.array_equal(other[1], first[1])
    turned = draw_mixup(IDS[::-1], 3, seed=1, alpha=0.4)
    assert [IDS[::-1][place] for place in turned[0]][::-1] == [IDS[place] for place in first[0]]
    np.testing.assert_array_equal(turned[1][::-1], first[1])


def test_everyone_has_one_partner_who_is_another_and_shares_follow_the_law() -> None:
    partner, _ = draw_mixup(IDS, 0, seed=0, alpha=1.0)
    assert sorted(partner) == list(range(64))
    assert all(place != other for place, other in enumerate(partner))
    shares = np.concatenate([draw_mixup(IDS, epoch, seed=0, alpha=1.0)[1] for epoch in range(40)])
    assert 0.5 <= shares.min() < 0.51
    assert abs(shares.mean() - 0.75) < 0.01  # of max(s, 1 - s), s uniform
    assert draw_mixup(IDS, 0, seed=0, alpha=0.01)[1].mean() > 0.98
    assert draw_mixup(["one"], 0, seed=0, alpha=1.0)[0] == [0]


def test_images_and_targets_are_blended_alike() -> None:
    values = torch.arange(6.0).reshape(3, 2)
    mixed = mix(values, [1, 2, 0], np.array([1.0, 0.75, 0.5]))
    assert mixed.tolist() == [[0, 1], [2.5, 3.5], [2, 3]]
    assert mixed.dtype == torch.float32
