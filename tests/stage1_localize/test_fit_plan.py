"""What a fit will be, before anything is computed: words, folds, foreign strings, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.config import load
from shared.errors import ConfigError, UsageError
from stage1_localize.fit_config import FitGrounderConfig
from stage1_localize.fit_plan import Plan, assign_folds, open_images, plan
from stage1_localize.fit_tasks import FITS, ImageChangedError, as_picture, read_fit, read_labelled
from tests.stage1_localize.coco_files import HEIGHT, WIDTH, change, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    return write_corpus(tmp_path)


def planned(corpus: tuple[Path, Path], **settings: Any) -> Plan:
    return plan(load(FitGrounderConfig, settings), images=corpus[0], labels=corpus[1])


def test_every_auto_is_resolved_and_defaults_are_the_category_s_name(corpus: tuple[Path, Path]) -> None:
    ready = planned(corpus)
    assert ready.config.regions == {"square": ("square",)}
    assert ready.config.lateral == ()
    assert ready.config.steps == 150
    assert any("no groups" in text for text in ready.warnings)
    assert any("only 5 images" in text for text in ready.warnings)
    assert json.loads(json.dumps(ready.spec())) == ready.spec()
    assert planned(corpus, regions={"square": ["left square"]}).config.lateral == ("square",)


def test_foreign_strings_leave_out_what_is_learnt_and_its_other_names(corpus: tuple[Path, Path]) -> None:
    ready = planned(corpus, regions={"square": ["WBC", "nodule"]}, foreign="circle")
    assert {"circle", "heart", "platelet", "left lung"} <= set(ready.foreign)
    assert not {"wbc", "leukocyte", "nodule"} & set(ready.foreign), "packaged names of the same thing"
    assert "heart" in ready.taught
    assert "lung nodule" in ready.foreign
    assert "lung nodule" not in ready.taught, "too near to be taught as absent"
    with pytest.raises(ConfigError, match="foreign: 'nodule' is a wording"):
        planned(corpus, regions={"square": "nodule"}, foreign="Nodule")


def test_unknown_regions_and_shared_words_are_refused(corpus: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="'sqare'") as caught:
        planned(corpus, regions={"sqare": "a"})
    assert caught.value.hint == "did you mean 'square'?"
    body = json.loads(corpus[1].read_text())
    rows = [{**row, "id": row["id"] + 50, "category_id": 8, "bbox": [1, 1, 9, 9]} for row in body["annotations"]]
    rows = [{key: value for key, value in row.items() if key != "segmentation"} for row in rows]
    categories = [*body["categories"], {"id": 8, "name": "dot"}, {"id": 9, "name": "never"}]
    change(corpus[1], annotations=[*body["annotations"], *rows], categories=categories)
    with pytest.raises(ConfigError, match="'dot' would mean both"):
        planned(corpus, regions={"square": "Dot"})
    ready = planned(corpus)
    assert list(ready.config.regions) == ["square", "dot"]
    assert ready.labels.outlined == {"square"}
    assert "categories without annotations are left out: never" in ready.warnings


def test_a_region_of_one_group_cannot_be_scored(corpus: tuple[Path, Path]) -> None:
    rows = "\n".join(f"images/{n}.png,patient" for n in range(6))
    (corpus[0].parent / "list.csv").write_text(f"image,group\n{rows}\n")
    body = json.loads(corpus[1].read_text())
    change(corpus[1], images=[{**row, "file_name": f"images/{row['file_name']}"} for row in body["images"]])
    with pytest.raises(UsageError, match=r"'square': in 5 images of 1 groups, at least 2"):
        plan(load(FitGrounderConfig, {}), images=corpus[0].parent / "list.csv", labels=corpus[1])


def test_another_size_than_the_labels_say_names_every_image(corpus: tuple[Path, Path]) -> None:
    body = json.loads(corpus[1].read_text())
    images = [{**row, "width": row["width"] + (row["id"] in (1, 3))} for row in body["images"]]
    change(corpus[1], images=images)
    ready = planned(corpus)
    with pytest.raises(UsageError, match=r"2 problems: image 1: 96 x 80 px, the labels say 97 x 80; image 3: "):
        open_images(corpus[1], ready.labels)


def test_a_damaged_image_is_kept_apart(corpus: tuple[Path, Path]) -> None:
    path = corpus[0] / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    usable, failed = open_images(corpus[1], planned(corpus).labels)
    assert len(usable) == 5
    assert {name: error.reason for name, error in failed.items()} == {"2.png": "decode_failed"}


def test_folds_keep_groups_whole_and_share_regions() -> None:
    present = {f"a{n}": frozenset({"x"}) for n in range(9)} | {f"b{n}": frozenset[str]() for n in range(6)}
    folds = assign_folds(present, 3, seed=0)
    for letter, each in (("a", 3), ("b", 2)):
        counts = [sum(f == fold for name, f in folds.items() if name[0] == letter) for fold in range(3)]
        assert counts == [each] * 3
    assert assign_folds(present, 3, seed=0) == folds
    assert assign_folds(present, 3, seed=1) != folds
    assert set(assign_folds({"a": frozenset(), "b": frozenset()}, 3, 0).values()) == {0, 1}


def test_no_image_is_on_both_sides_and_the_kept_head_sees_all(corpus: tuple[Path, Path]) -> None:
    ready = planned(corpus)
    tasks = ready.tasks(Path("."), ready.labels.images)
    assert [task.name for task in tasks] == ["fold-0", "fold-1", "fold-2", "all"]
    for task in tasks[:-1]:
        assert not {i.image_id for i in task.train} & {i.image_id for i in task.held_out}
    assert sorted(i.image_id for task in tasks[:-1] for i in task.held_out) == list(range(6))
    assert len(tasks[-1].train) == 6
    assert not tasks[-1].held_out


def test_no_annotation_means_absent_or_unknown_as_asked(corpus: tuple[Path, Path]) -> None:
    for exhaustive in (True, False):
        ready = planned(corpus, exhaustive=exhaustive)
        subject = ready.subject(Path("."))
        empty = as_picture(ready.labels.images[5], subject)
        assert empty.absent == ({"square"} if exhaustive else set())
        assert len(ready.tasks(Path("."), ready.labels.images)[-1].train) == 5 + exhaustive
    full = as_picture(ready.labels.images[0], subject)
    assert full.masks["square"].shape == (HEIGHT, WIDTH)
    assert full.masks["square"][20, 12] == 1
    assert not full.absent


def test_an_image_that_changes_after_the_corpus_was_listed_is_refused(corpus: tuple[Path, Path]) -> None:
    ready = planned(corpus)
    item = ready.labels.images[0]
    other = ready.labels.images[1]
    assert read_labelled(item).source_sha256 == item.source_sha256
    item.source.path.write_bytes(other.source.path.read_bytes())
    with pytest.raises(ImageChangedError, match=item.source.sample_id):
        read_labelled(item)


def test_a_kept_fit_counts_for_its_own_images_only_and_if_it_is_whole(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    ready = planned(corpus, folds=2)
    task = ready.tasks(tmp_path, ready.labels.images)[0]
    folder = tmp_path / FITS
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "fold-0.safetensors")
    (folder / "fold-0.json").write_text(json.dumps({"images": task.images_sha256, "tries": {}}))
    assert read_fit(task) is not None
    assert read_fit(replace(task, train=task.train[1:])) is None
    (folder / "fold-0.safetensors").write_bytes(b"")
    assert read_fit(task) is None
    (folder / "fold-0.json").write_bytes(b"")
    assert read_fit(task) is None
