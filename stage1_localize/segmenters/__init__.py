"""Segmenters: detections in, pixel probabilities out. Add a file and one line here."""

from shared.registry import Registry

SEGMENTERS = Registry(
    "segmenter",
    {
        "boxfill": "stage1_localize.segmenters.boxfill:BoxFill",
        "lite_medsam": "stage1_localize.segmenters.lite_medsam:LiteMedSam",
        "none": "stage1_localize.segmenters.none:NoSegmenter",
        "sam": "stage1_localize.segmenters.sam:Sam",
        "sam2": "stage1_localize.segmenters.sam2:Sam2",
        "segment_anything": "stage1_localize.segmenters.segment_anything:SegmentAnything",
    },
)
