"""Heads of `lite` that never saw a part of its training images, so that a study can localise that part honestly.

The packaged head has learnt from the ``train`` parts: regions that it finds there are better than those of new
images. A head of fold I has learnt from none of fold I's groups. Put together, the K heads of one split answer every
training image as an unseen one. Tumours are outlined in br35h alone: a head without that set cannot know the word,
so for tumours folds are the only honest answer.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.lite_pictures import SETS, pictures
from shared.artifact import Artifact, publish
from shared.errors import UsageError
from stage1_localize.fit_plan import assign_folds
from stage1_localize.grounders.lite_card import KIND, Card, write_head
from stage1_localize.pictures import Picture

SPLIT_SEED = 0
"""Of the split into folds; not the fit's seed, so that heads of other seeds share the split."""


@dataclass(frozen=True)
class Left:
    """What a fit leaves out.

    Attributes:
        sets: Whole sets.
        folds: Parts that the other sets' groups are dealt into; 1: none.
        fold: The part that is left out, 0 to ``folds`` - 1.
        groups: Its groups, as ``set/group``.
    """

    sets: tuple[str, ...] = ()
    folds: int = 1
    fold: int = 0
    groups: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.sets or self.groups)

    def keeps(self, source: str, group: str) -> bool:
        """Whether a fit may see an image of this set and group."""
        return source not in self.sets and f"{source}/{group}" not in self.groups

    def as_dict(self) -> dict[str, Any]:
        """Float-free JSON, for cards."""
        return {"sets": list(self.sets), "folds": self.folds, "fold": self.fold, "groups": len(self.groups)}


def leave_out(data: Path, sets: Sequence[str], folds: int, fold: int | None) -> Left:
    """Deal the groups of every set's ``train`` part into folds and name what is left out.

    Args:
        data: Folder with ``manifest.csv``.
        sets: Whole sets to leave out.
        folds: 1 for none.
        fold: Part to leave out; None only without folds.

    Raises:
        UsageError: An unknown set, all sets, or a fold outside the folds.
    """
    unknown = sorted(set(sets) - set(SETS))
    if unknown or set(sets) >= set(SETS):
        what = f"'{unknown[0]}'" if unknown else "every set"
        raise UsageError(f"--without: {what}, expected some of {', '.join(SETS)}", hint="name a set to leave out")
    if folds < 1 or (folds > 1) != (fold is not None) or (fold is not None and not 0 <= fold < folds):
        raise UsageError(
            f"--folds {folds} --fold {fold}: expected both, the fold from 0 to folds - 1",
            hint="--folds 2 --fold 0 leaves out the first half of the training groups",
        )
    if fold is None:
        return Left(tuple(sets))
    groups = {f"{row['set']}/{row['group']}": frozenset([row["set"]]) for row in _rows(data) if row["set"] not in sets}
    dealt = assign_folds(groups, folds, SPLIT_SEED)
    return Left(tuple(sets), folds, fold, frozenset(name for name, number in dealt.items() if number == fold))


def held_out(data: Path, left: Left) -> Iterator[Picture]:
    """The ``train`` pictures of the groups that are left out."""
    return pictures(data, "train", lambda source, group: f"{source}/{group}" in left.groups)


def write_lists(data: Path, left: Left, out: Path) -> list[Path]:
    """An image list a set, ``held-out-SET.csv``: the left-out part of ``train``, with groups.

    Paths are the manifest's: ``mwm localize --images`` takes a list that lies in ``data`` or in a copy of it.
    """
    rows = [row for row in _rows(data) if not left.keeps(row["set"], row["group"])]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in SETS:
        kept = [row for row in rows if row["set"] == name]
        if kept:
            written.append(out / f"held-out-{name}.csv")
            with written[-1].open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["image", "sample_id", "group"])
                for row in kept:
                    table.writerow([row["image"], row["image"], row["group"]])
    return written


def publish_head(folder: Path, card: Card, state: Mapping[str, Tensor], left: Left) -> Artifact:
    """Publish a head that ``mwm localize --set grounder.options.head=FOLDER`` opens.

    Raises:
        UsageError: The folder is already published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = write_head(folder, card, state)
    fit = {key: value for key, value in card.fit.items() if key != "software"}
    routes = [{"name": name, "route": concept.route} for name, concept in card.concepts.items()]
    outputs = {"images": sum(card.fit["examples"].values()), "quarantined": 0, "regions": routes, **digests}
    made = publish(folder, kind=KIND, inputs=[], spec={**fit, "left_out": left.as_dict()}, outputs=outputs)
    return Artifact(folder, made)


def _rows(data: Path) -> list[dict[str, str]]:
    with (data / "manifest.csv").open(newline="", encoding="utf-8") as table:
        return [row for row in csv.DictReader(table) if row["set"] in SETS and row["split"] == "train"]
