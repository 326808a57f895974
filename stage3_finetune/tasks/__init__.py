"""What a model can be fine-tuned for: one file and one line here a task."""

from __future__ import annotations

from shared.registry import Registry

TASKS = Registry(
    "task",
    {
        "classify": "stage3_finetune.tasks.classify:Classify",
        "detect": "stage3_finetune.tasks.detect:Detect",
        "segment": "stage3_finetune.tasks.segment:Segment",
    },
)
