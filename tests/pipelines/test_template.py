"""The template: real, in order, the right way up."""

import numpy as np
import pytest

from pipelines.template import template_slices

pytestmark = pytest.mark.filterwarnings("ignore")


def test_slices_run_bottom_to_top_over_the_brain():
    slices = template_slices()
    heights = [int(piece.name[1:]) for piece in slices]
    assert [piece.index for piece in slices] == list(range(len(slices)))
    assert heights == list(range(heights[0], heights[0] + len(slices)))
    assert len(slices) > 140
    assert all(piece.brain_fraction > 0 for piece in slices)
    areas = [piece.brain_fraction for piece in slices]
    assert 40 < int(np.argmax(areas)) < 110
    assert slices[70].pixels.shape == (233, 197)


def test_tissue_maps_are_probabilities_inside_the_brain():
    for piece in template_slices()[30:140:30]:
        assert piece.pixels.dtype == np.uint8
        assert piece.grey.dtype == piece.white.dtype == np.float32
        assert piece.grey.min() >= 0
        assert (piece.grey + piece.white).max() <= 1.01
        tissue = piece.grey + piece.white > 0.5
        assert (piece.brain[tissue] == 1).mean() > 0.97
        assert (
            piece.pixels[piece.white > 0.9].mean() > piece.pixels[piece.grey > 0.9].mean() + 10
        )  # T1: white is bright


def test_the_front_is_up():
    # At this height both eyes' sockets are stripped, but the temporal poles narrow the front and the cerebellum
    # rounds the back: the brain's lowest slices are cerebellum and stem, so their mass lies below the centre row.
    piece = template_slices()[15]
    rows = np.nonzero(piece.brain)[0]
    assert rows.mean() > piece.pixels.shape[0] / 2


def test_slices_cannot_be_changed():
    piece = template_slices()[0]
    with pytest.raises(ValueError, match="read-only"):
        piece.pixels[0, 0] = 1
