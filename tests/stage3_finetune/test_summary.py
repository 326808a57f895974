"""The report's curves and what it says where there is no interval."""

import numpy as np

from stage3_finetune.metrics import score
from stage3_finetune.summary import curves, write_report


def test_curves_are_by_epoch() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 5)]
    rows += [{"step": 2, "epoch": 1, "val_loss": 0.5, "val_auroc": None}]
    rows += [{"step": 4, "epoch": 2, "val_loss": 0.4, "val_auroc": 0.8}]
    assert curves(rows, 2) == {
        "training loss": ([1.0, 2.0], [1.5, 3.5]),
        "val loss": ([1.0, 2.0], [0.5, 0.4]),
        "val AUROC": ([2.0], [0.8]),
    }


def test_a_report_says_that_one_group_has_no_interval(tmp_path) -> None:
    label = np.array([0, 1, 0, 1])
    scores = score(np.eye(2, dtype=np.float32)[label], label, ["one"] * 4, classes=("<a>", "b"), seed=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    write_report(
        tmp_path, scores, beside=(3, scores), per_epoch=1, resamples=9, facts={"epochs": 1}, warnings=["look here"]
    )
    text = (tmp_path / "report.html").read_text()
    for wanted in ("no intervals: 4 samples in 1 group", "1.000 (no interval)", "&lt;a&gt;", "epoch 3", "look here"):
        assert wanted in text
    assert "<a>" not in text
