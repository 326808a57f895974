"""Regions from labels instead of from the image: the upper bound of a study, never a localiser.

A region's text is a category of a COCO file; its map is the union of that category's outlines, of its boxes where
they have none. A sample is known by its id, which must be the labels' file name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch.nn.functional import interpolate

from shared.coco import CocoLabels, Labelled, Thing, read_coco
from shared.config import Strict, runtime
from shared.errors import PromptError, UsageError
from shared.outlines import Outline, draw
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region


class Oracle:
    """Answers from a file."""

    class Options(Strict):
        """Where the labels are; what they say is part of the store's id, where they lie is not."""

        labels: str = runtime(..., "COCO JSON file; its file names are sample ids of the corpus.")

        def anywhere(self) -> Oracle.Options:
            """The same, for a process in another folder."""
            return Oracle.Options(labels=str(Path(self.labels).absolute()))

    version = 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, regions: Sequence[Region]) -> None:
        """Accept the categories of the labels.

        Raises:
            PromptError: Any other text.
            InputMissingError, UsageError: No labels, or labels that do not hold together.
        """
        for region in regions:
            for text in region.texts:
                if text.casefold() not in self._categories:
                    raise PromptError(
                        f"region '{region.name}': '{text}' is no category of the labels",
                        hint=f"known: {', '.join(self._labels.regions)}",
                    )

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Every region comes with pixels."""
        return False

    def identity(self) -> dict[str, Any]:
        """What the labels say, whatever their layout."""
        return {"labels": self._labels.sha256}

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Each annotation is a detection of score 1.

        Raises:
            UsageError: An image that the labels do not list, or not in its size: no annotation is not "nothing there".
        """
        blank = Detections.none()
        return [
            self._locate(self._listed(name, image), regions) if name else blank
            for name, image in zip(batch.sample_ids, batch.images, strict=True)
        ]

    @cached_property
    def _labels(self) -> CocoLabels:
        return read_coco(Path(self.options.labels), None)

    @cached_property
    def _categories(self) -> dict[str, str]:
        return {name.casefold(): name for name in self._labels.regions}

    @cached_property
    def _by_id(self) -> dict[str, Labelled]:
        return {item.source.sample_id: item for item in self._labels.images}

    def _listed(self, name: str, image: Float32[np.ndarray, "C H W"]) -> Labelled:
        found = self._by_id.get(name)
        if found is None:
            raise UsageError(
                f"grounder 'oracle': the labels do not list {name}",
                hint="list it, without annotations where it holds none, or leave it out of the images",
            )
        if (found.height, found.width) != image.shape[1:]:
            raise UsageError(
                f"grounder 'oracle': {name} is {image.shape[2]}x{image.shape[1]} px, its labels say "
                f"{found.width}x{found.height}"
            )
        return found

    def _locate(self, item: Labelled, regions: Sequence[Region]) -> Detections:
        found = [
            (thing, r, t)
            for r, region in enumerate(regions)
            for t, text in enumerate(region.texts)
            for thing in item.things
            if thing.region == self._categories[text.casefold()]
        ]
        unknown = {self._categories[text.casefold()] for region in regions for text in region.texts} & item.unknown
        if unknown:
            raise UsageError(
                f"grounder 'oracle': {item.source.sample_id}: a crowd annotation says nothing of '{min(unknown)}'",
                hint="outline its things, or leave the image out",
            )
        return Detections(
            box_xyxy_px=np.array([thing.box_xyxy_px for thing, _, _ in found], np.float32).reshape(-1, 4),
            score=np.ones(len(found), np.float32),
            region=np.array([r for _, r, _ in found], np.int64),
            text=np.array([t for _, _, t in found], np.int64),
            probability=[_map(thing, item.height, item.width) for thing, _, _ in found],
        )


def _map(thing: Thing, height: int, width: int) -> Float32[np.ndarray, "256 256"]:
    """Share of each pixel of the map frame that an annotation covers."""
    x0, y0, x1, y1 = thing.box_xyxy_px
    outline = thing.outline or Outline(polygons=((x0, y0, x1, y0, x1, y1, x0, y1),))
    drawn = torch.from_numpy(draw(outline, height, width))[None, None]
    sized = interpolate(drawn, (MAP_SIZE_PX, MAP_SIZE_PX), mode="bilinear", antialias=True)
    return sized[0, 0].clamp_(0, 1).numpy()
