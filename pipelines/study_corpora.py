"""The folder that `mwm run study` reads, made from the public images.

``python -m pipelines.study_corpora --data DATA --out CORPORA``; DATA holds ``manifest.csv`` with the columns set,
image, target, label and group. Both parts of a set are taken: a study makes folds of its own, by group.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from shared.errors import InputMissingError, MwmError, UsageError
from stage3_finetune.annotations import HUNDREDTHS, Annotated, FaultyFile, read_indices

SHORTCUT = "notumor"
"""Class of brain4 that comes from other scanners: its label can be told without looking at the brain. Left out."""
SETS = ("brain4", "br35h")
COLUMNS = ("set", "image", "target", "label", "group")
OUTLINED = "brain tumour"
"""The words of the recipe, which grounder `oracle` takes for a category."""


def write_corpora(data: Path, out: Path) -> dict[str, int]:
    """Copy images, and write their lists, labels and outlines.

    Args:
        data: Folder with ``manifest.csv``.
        out: A new or empty folder, or one that this has written.

    Returns:
        Images by set.

    Raises:
        InputMissingError: No manifest, or no image that it names.
        UsageError: ``out`` is ``data``; a manifest without the columns; an outline that cannot be read.
    """
    manifest = data / "manifest.csv"
    if not manifest.is_file():
        raise InputMissingError(f"{manifest}: no such file", hint="the folder of the public images holds it")
    if out.resolve() == data.resolve() or out.is_file():
        raise UsageError(f"--out {out}: expected a new folder")
    with manifest.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
            raise UsageError(f"{manifest}: no column '{missing[0]}'")
        rows = [row for row in table if row["set"] in SETS and row["label"] != SHORTCUT]
    for row in rows:
        for name in filter(None, (row["image"], row["target"])):
            if not (data / name).is_file():
                raise InputMissingError(f"{data / name}: no such file, and {manifest.name} names it")
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / name, out / name)
    sets = {name: [row for row in rows if row["set"] == name] for name in SETS}
    for name, own in sets.items():
        listed = [(row["image"], sample_id(row["image"]), row["group"]) for row in own]
        _write(out / f"{name}.csv", ("image", "sample_id", "group"), listed)
    kinds = [(sample_id(row["image"]), row["label"], row["group"]) for row in sets["brain4"]]
    _write(out / "brain4-labels.csv", ("sample_id", "label", "group"), kinds)
    targets = [(sample_id(row["image"]), row["target"], row["group"]) for row in sets["br35h"]]
    _write(out / "br35h-labels.csv", ("sample_id", "target", "group"), targets)
    try:
        outlines = _coco([(name, read_indices(out / target)) for name, target, _ in targets])
    except FaultyFile as error:
        raise UsageError(f"{manifest.name}: a target of br35h: {error}") from None
    (out / "br35h-outlines.json").write_text(json.dumps(outlines), encoding="utf-8")
    return {name: len(own) for name, own in sets.items()}


def sample_id(image: str) -> str:
    """An id without folders, from an image's path in the manifest.

    >>> sample_id("br35h/train/images/y0.png")
    'br35h-train-images-y0'
    """
    return PurePosixPath(image).with_suffix("").as_posix().replace("/", "-")


def _coco(targets: Sequence[tuple[str, Annotated]]) -> dict[str, Any]:
    """The outlines as COCO labels of sample ids, for grounder `oracle`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, said) in enumerate(targets, 1):
        height, width = said.size_px
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for thing in said.things:
            x0, y0, x1, y1 = (side / HUNDREDTHS for side in thing.box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": [height, width], "counts": thing.mask},
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": OUTLINED}]}


def _write(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args()
    try:
        made = write_corpora(given.data, given.out)
    except (MwmError, OSError) as error:
        parser.error(str(error))
    print(", ".join(f"{name}: {count} images" for name, count in made.items()))


if __name__ == "__main__":
    main()
