"""Grounders: text and image in, detections out. Add a file and one line here."""

from shared.registry import Registry

GROUNDERS = Registry(
    "grounder",
    {
        "biomedclip": "stage1_localize.grounders.biomedclip:BiomedClip",
        "contrast": "stage1_localize.grounders.contrast:Contrast",
        "grounding_dino": "stage1_localize.grounders.grounding_dino:GroundingDino",
        "groundingdino_py": "stage1_localize.grounders.groundingdino_py:GroundingDinoPy",
        "lite": "stage1_localize.grounders.lite:Lite",
        "oracle": "stage1_localize.grounders.oracle:Oracle",
        "planted": "stage1_localize.grounders.planted:Planted",
        "sam3": "stage1_localize.grounders.sam3:Sam3",
        "supervoxels": "stage1_localize.grounders.supervoxels:Supervoxels",
    },
)
