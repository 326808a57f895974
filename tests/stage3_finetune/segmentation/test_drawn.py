"""Label maps as run lengths: back to the bit, and refused where they do not fit together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stage3_finetune.segmentation.drawn import IGNORE, Drawn, draw

CLASSES = ("a", "b")
MAPS = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.sampled_from([0, 1, 2, IGNORE]),
)


@given(MAPS)
@settings(max_examples=60, deadline=None)
def test_label_maps_come_back_whatever_the_order_of_classes(label: np.ndarray) -> None:
    drawn = draw(label, CLASSES)
    np.testing.assert_array_equal(drawn.label(CLASSES), label)
    swapped = np.array([0, 2, 1], np.uint8)
    other = np.where(label == IGNORE, label, swapped[np.minimum(label, 2)])
    np.testing.assert_array_equal(drawn.label(CLASSES[::-1]), other)
    assert draw(other, CLASSES[::-1]).sha256 == drawn.sha256
    changed = label.copy()
    changed[0, 0] = 1 if label[0, 0] != 1 else 0
    assert draw(changed, CLASSES).sha256 != drawn.sha256


@pytest.mark.parametrize(
    "drawn",
    [
        Drawn((2, 2), {"a": "22", "b": "13"}),  # a pixel in both
        Drawn((2, 2), {"a": "22"}, "13"),
        Drawn((2, 3), {"a": "22"}),
        Drawn((2, 2), {"c": "22"}),
        Drawn((2, 2), {"a": "2"}),
        Drawn((2, 2), {"a": ""}),
        Drawn((2, 2), {"a": "~"}),
    ],
)
def test_what_does_not_fit_together_is_refused(drawn: Drawn) -> None:
    with pytest.raises(ValueError, match=r"."):
        drawn.label(CLASSES)
