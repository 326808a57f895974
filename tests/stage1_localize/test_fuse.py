"""Fusion against the formula, worked out pixel by pixel in double precision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_localize.contracts import MAP_SIZE_PX, Detections
from stage1_localize.fuse import fuse, to_grid

SIDE = (MAP_SIZE_PX, MAP_SIZE_PX)


def detections(entries: list[tuple[int, int, float]], seed: int = 0) -> tuple[Detections, list[np.ndarray]]:
    """Entries are (region, wording, score); boxes and pixels are random but fixed by the seed."""
    generator = np.random.default_rng(seed)
    n = len(entries)
    found = Detections(
        generator.integers(0, 9, (n, 4)).astype(np.float32),
        np.array([score for _, _, score in entries], np.float32),
        np.array([region for region, _, _ in entries], np.int64),
        np.array([text for _, text, _ in entries], np.int64),
        [None] * n,
    )
    return found, [generator.random(SIDE, np.float32) for _ in range(n)]


def by_formula(found: Detections, segments: list[np.ndarray], k: int) -> np.ndarray:
    maps = np.zeros((k, *SIDE))
    for region in range(k):
        for text in set(found.text[found.region == region].tolist()):
            product = np.ones(SIDE)
            for i in np.nonzero((found.region == region) & (found.text == text))[0]:
                product *= 1 - np.float64(found.score[i]) * segments[i].astype(np.float64)
            maps[region] = np.maximum(maps[region], 1 - product)
    return maps


ENTRIES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=6)


@settings(max_examples=25, deadline=None)
@given(ENTRIES, st.integers(0, 99))
def test_fusion_is_the_formula_in_any_order(entries: list[tuple[int, int, float]], seed: int) -> None:
    found, segments = detections(entries, seed)
    maps = fuse(found, segments, 3)
    np.testing.assert_allclose(maps, by_formula(found, segments, 3), atol=1e-6)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
    order = np.random.default_rng(seed).permutation(len(entries))
    shuffled = Detections(
        found.box_xyxy_px[order],
        found.score[order],
        found.region[order],
        found.text[order],
        [None] * len(order),
    )
    np.testing.assert_array_equal(fuse(shuffled, [segments[i] for i in order], 3), maps)


def test_the_fold_runs_by_descending_score_to_the_bit() -> None:
    found, segments = detections([(0, 0, 0.3), (0, 0, 0.9), (0, 0, 0.6)])
    found.box_xyxy_px[:] = found.score[:, None]  # box order would be the other way round
    factors = [np.float32(1) - score * segment for score, segment in zip(found.score, segments, strict=True)]
    descending = np.float32(1) - factors[1] * factors[2] * factors[0]
    ascending = np.float32(1) - factors[0] * factors[2] * factors[1]
    assert (descending != ascending).any()
    np.testing.assert_array_equal(fuse(found, segments, 1)[0], descending)


def test_equal_scores_and_boxes_fold_by_pixels() -> None:
    found, segments = detections([(0, 0, 0.7)] * 3)
    found.box_xyxy_px[:] = 1
    turned = [segments[i] for i in (2, 0, 1)]
    np.testing.assert_array_equal(fuse(found, segments, 1), fuse(found, turned, 1))


def test_wordings_merge_by_max_not_by_product() -> None:
    found, _ = detections([(0, 0, 1.0), (0, 1, 1.0)])
    halves = [np.full(SIDE, 0.5, np.float32)] * 2
    assert (fuse(found, halves, 1) == 0.5).all()
    found.text[:] = 0
    assert (fuse(found, halves, 1) == 0.75).all()


def test_nothing_found_is_zero_everywhere() -> None:
    maps = fuse(Detections.none(), [], 2)
    assert maps.shape == (2, *SIDE)
    assert not maps.any()


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_what_is_no_probability_is_refused(bad: float) -> None:
    found, segments = detections([(0, 0, 0.5)])
    segments[0][3, 4] = bad
    with pytest.raises(ValueError, match="pixel probability"):
        fuse(found, segments, 1)
    found, segments = detections([(0, 0, bad)])
    with pytest.raises(ValueError, match="score"):
        fuse(found, segments, 1)


@pytest.mark.parametrize("size", [16, 64, 128, 256, 384, 512])
def test_the_grid_is_bilinear_with_half_pixel_centres(size: int) -> None:
    import torch

    maps = np.random.default_rng(0).random((2, *SIDE), np.float32)
    peer = torch.nn.functional.interpolate(
        torch.from_numpy(maps)[None], size=(size, size), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(to_grid(maps, size), peer[0].numpy(), atol=2e-5)
    assert to_grid(maps, size).dtype == np.float32
