"""What `mwm predict` can write. Add a file and one line here.

A writer is a class, see `pipelines.answers.contract`; ``kinds`` are those of `stage3_finetune.contracts.Task` it takes.
"""

from shared.registry import Registry

WRITERS = Registry(
    "writer",
    {
        "coco": "pipelines.answers.coco_file:CocoFile",
        "csv": "pipelines.answers.csv_file:CsvFile",
        "nifti": "pipelines.answers.nifti_files:NiftiFiles",
        "png": "pipelines.answers.png_files:PngFiles",
    },
)

USUAL = {"probability": "csv", "labels": "png", "instances": "coco"}
"""Kind of a task's answers -> what they are written as if nothing is asked for."""
