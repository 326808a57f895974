"""The report of a store: it does not grow with the store, and says of each picture why it is shown."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from shared.images import find_sources
from stage1_localize.examples import EXAMPLES_MAX, NOTHING, SPREAD
from stage1_localize.summary import left_out, write_report
from tests.shared.region_stores import make_content, write


def report(root: Path, count: int, quarantined: int) -> str:
    (root / "images").mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (48, 48)).astype(np.uint8)
    for row in range(count):
        Image.fromarray(picture).save(root / "images" / f"{row:04d}.png")
    content = make_content(count, quarantined=range(1, 2 * quarantined, 2))
    empty = count // 2 * 2 - 4
    content.maps[empty] = 0
    content.boxes[empty] = (np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16))
    card = write(root / "store", content)
    write_report(
        root / "store",
        card.identity.outputs,
        prompts={name: [name] for name in content.regions},
        sources=find_sources(root / "images"),
        facts={},
        warnings=[],
    )
    page = (root / "store" / "report.html").read_text()
    assert f"worst of the {count - quarantined} images measured" in page
    assert f'<div class="case"><h3>sample-{empty:04d}</h3><p class="why">' in page
    assert f'data-why="{NOTHING}"' in page
    return page


def test_ten_times_the_images_make_no_larger_a_page(tmp_path: Path) -> None:
    few, many = report(tmp_path / "few", 60, 25), report(tmp_path / "many", 600, 250)
    assert abs(len(many) - len(few)) < 0.1 * len(few)
    for page in (few, many):
        assert page.count('<div class="case">') <= EXAMPLES_MAX
        assert page.count(f'data-why="{SPREAD}"') == 8
        assert page.count("<td>truncated file</td>") == 20
    assert "20 of 250 images left out" in many


def test_quarantined_samples_of_a_rare_reason_are_not_crowded_out(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    reasons = ["decode_failed"] * 1000 + ["too_large"] + [f"reason-{n % 50}" for n in range(5000)]
    path.write_text(
        "".join(
            json.dumps({"sample_id": f"s{row:05d}", "reason": reason, "stage": "read", "message": "m"}) + "\n"
            for row, reason in enumerate(reasons)
        )
    )
    kept = left_out(path)
    assert len(kept) == 120
    assert [item.sample_id for item in kept[:20]] == [f"s{row:05d}" for row in range(20)]
    assert (kept[20].sample_id, kept[20].reason, kept[20].message) == ("s01000", "too_large", "m")
    assert max(sum(item.reason == reason for item in kept) for reason in set(reasons)) == 20
    path.write_text("")
    assert left_out(path) == []
