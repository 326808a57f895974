"""No segmenter: nothing for nothing, and a clear refusal otherwise."""

import numpy as np
import pytest

from shared.errors import ConfigError
from stage1_localize.contracts import Batch, Detections
from stage1_localize.segmenters.none import NoSegmenter


def test_nothing_for_nothing_and_an_error_for_boxes() -> None:
    part = NoSegmenter(NoSegmenter.Options())
    batch = Batch([np.zeros((1, 4, 4), np.float32)], ["a"])
    assert [segment.shape for segment in part.segment(batch, [Detections.none()])] == [(0, 256, 256)]
    one = Detections(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, int), np.zeros(1, int), [None])
    with pytest.raises(ConfigError, match="left 1 boxes without pixels"):
        part.segment(batch, [one])
