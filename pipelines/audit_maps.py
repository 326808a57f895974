"""Level ``maps`` of an audit: rows of a region store, drawn by the auditor's nonce, made again and compared.

And whether the words matter: five prompts that name nothing in a medical image must not give the maps that the
store's own prompts give.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.errors import CorruptError, PromptError, UsageError
from shared.gallery import Example, gallery
from shared.page import Section, table
from shared.regions import RegionStore, decode_probability
from shared.rng import below, uniform_u32
from stage1_localize.contracts import Region
from stage1_localize.recompute import Made, Recomputer, differs_by, same

MapVerdict = Literal["identical", "tolerant", "drift", "corrupt", "unrecomputable"]
ROWS = 299
"""Rows that find 1 % of drifting ones with 95 % confidence: .99 ** 299 < .05."""
CONFIDENCE = 0.95
PIXELS_MIN, OVERLAP_MIN = 0.999, 0.99
"""Of `tolerant`: share of pixels within 2 of 254, and IoU at .5 of every region."""
CONTROLS = ("sitting on a chair", "a red bicycle", "freshly baked bread", "stock market report", "a birthday song")
CONTROL_ROWS, CONTROL_MAX = 16, 0.25
_SHOWN, _LISTED = 6, 50
MAP_VERDICTS: tuple[MapVerdict, ...] = ("identical", "tolerant", "unrecomputable", "drift", "corrupt")


@dataclass(frozen=True)
class Again:
    """How rows are made again.

    Attributes:
        images: Folder or list that the store was made from.
        nonce: The auditor's own; draws the rows.
        rows: How many; None: all.
        overrides: ``path.to.key=value`` of settings that named files of the machine that made the store.
        progress: Called with rows done and rows in all.
    """

    images: Path
    nonce: str
    rows: int | None = ROWS
    overrides: tuple[str, ...] = ()
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class RowVerdict:
    """What became of one row."""

    row: int
    sample_id: str
    verdict: MapVerdict
    detail: str = ""
    pixels_within: float | None = None
    iou: float | None = None


@dataclass(frozen=True)
class Control:
    """Whether unrelated prompts find as much as the store's own.

    Attributes:
        verdict: ``identical`` passes; ``drift`` fails; ``unrecomputable``: nothing to compare.
        detail: In words.
        median: Of control mass over real mass, over samples; None where it was not measured.
        samples: How many it was measured on.
    """

    verdict: Literal["identical", "drift", "unrecomputable"]
    detail: str
    median: float | None = None
    samples: int = 0


@dataclass(frozen=True)
class MapsAudit:
    """What level ``maps`` found in one store.

    Attributes:
        nonce: Draws the same rows again.
        of: Rows that could be drawn.
        rows: Verdict of every row drawn.
        drift_max: Upper end of the exact 95 % interval for the share of rows that are not as published, or None;
            rows that could not be judged count as such.
        quarantined: Rows without maps, which are not drawn.
        control: Of the prompts.
        examples: Pictures of the worst rows and of some others: published, made again, and their difference.
    """

    nonce: str
    of: int
    rows: tuple[RowVerdict, ...]
    drift_max: float | None
    control: Control
    examples: tuple[Example, ...] = ()
    quarantined: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, without pictures."""
        return {
            "nonce": self.nonce,
            "of": self.of,
            "rows": [asdict(row) for row in self.rows],
            "drift_max": self.drift_max,
            "quarantined": self.quarantined,
            "control": asdict(self.control),
        }

    @property
    def judged(self) -> int:
        """Rows that were compared or are damaged."""
        return sum(row.verdict != "unrecomputable" for row in self.rows)

    def told(self, verdict: str) -> str:
        """What a line says of the rows with one verdict."""
        those = [row for row in self.rows if row.verdict == verdict]
        worst = sorted(those, key=lambda row: (row.pixels_within or 0) + (row.iou or 0))[:_SHOWN]
        named = "; ".join(f"{row.sample_id}: {row.detail}" for row in worst if row.detail)
        more = f"; and {len(those) - len(worst)} more" if named and len(those) > len(worst) else ""
        drawn = f"{len(self.rows)} of {self.of} rows drawn by nonce {self.nonce}"
        drawn += f", {self.quarantined} quarantined ones not" if self.quarantined else ""
        bound = "" if self.drift_max is None else f"; at most {self.drift_max:.2%} of all drift (95 %)"
        return f"{named}{more} ({drawn}{bound})" if named else f"{drawn}{bound}"

    def section(self, name: str) -> Section:
        """Of the report: verdicts of rows, and pictures."""
        rows = [
            (row.row, row.sample_id, row.verdict, row.detail)
            for row in sorted(self.rows, key=lambda row: (MAP_VERDICTS.index(row.verdict), row.row), reverse=True)
        ]
        listed = table(("row", "sample", "verdict", "detail"), rows[:_LISTED])
        more = f"<p>and {len(rows) - _LISTED} more, in maps.json</p>" if len(rows) > _LISTED else ""
        bound = "" if self.drift_max is None else f" At most {self.drift_max:.2%} of all rows drift (95 %)."
        note = f"{len(self.rows)} of {self.of} rows; --nonce {self.nonce} draws them again."
        return Section(f"Maps of {name} made again", f"{listed}{more}{gallery(self.examples)}", note + bound)


def fresh_nonce() -> str:
    """A nonce that whoever made the store could not foresee."""
    return secrets.token_hex(8)


def draw_rows(root: str, nonce: str, candidates: Sequence[int], count: int) -> list[int]:
    """Rows to make again: by Philox from sha256(root, NUL, nonce), without repeats, ascending.

    Args:
        root: `maps_root` of the store's card.
        nonce: The auditor's own.
        candidates: Rows that hold maps.
        count: How many; all if there are fewer.

    >>> draw_rows("ab", "n", range(4), 9)
    [0, 1, 2, 3]
    """
    if count >= len(candidates):
        return sorted(candidates)
    seed = int.from_bytes(hashlib.sha256(f"{root}\0{nonce}".encode()).digest()[:8], "little")
    words = uniform_u32("audit maps", seed, root, 0, count)
    pool = list(candidates)
    for place in range(count):  # the first steps of a Fisher-Yates shuffle
        other = place + int(below(words[place : place + 1], len(pool) - place)[0])
        pool[place], pool[other] = pool[other], pool[place]
    return sorted(pool[:count])


def audit_maps(store: RegionStore, how: Again) -> MapsAudit:
    """Make some rows again and compare; then ask unrelated prompts.

    Raises:
        IncompatibleError: Other weights or versions are installed here: nothing can be made again.
        UsageError: Images or overrides that do not fit.
    """
    again = Recomputer(store, how.images, how.overrides)
    candidates = [sample.row for sample in store.samples if sample.status == "ok"]
    root = str(store.card.identity.outputs["maps_root"])
    drawn = draw_rows(root, how.nonce, candidates, how.rows or len(candidates))
    verdicts: list[RowVerdict] = []
    shown: list[tuple[float, int, Made]] = []
    for done, row in enumerate(drawn):
        how.progress(done, len(drawn))
        made = again.make(row)
        verdict = _verdict(store, row, made)
        verdicts.append(verdict)
        if made.answer is not None and verdict.verdict != "corrupt":
            badness = (
                2.0 - (verdict.pixels_within or 0) - (verdict.iou or 0) if verdict.verdict != "identical" else -1.0
            )
            shown = sorted([*shown, (badness, row, made)], key=lambda item: -item[0])[:_SHOWN]
    how.progress(len(drawn), len(drawn))
    # A row that could not be judged counts as one that is not as published: who forges could make it so.
    bad = sum(verdict.verdict not in ("identical", "tolerant") for verdict in verdicts)
    return MapsAudit(
        how.nonce,
        len(candidates),
        tuple(verdicts),
        upper_bound(bad, len(verdicts), len(candidates)),
        control(again, drawn),
        tuple(_example(store, again, row, made) for _, row, made in shown),
        len(store) - len(candidates),
    )


def upper_bound(found: int, drawn: int, of: int) -> float | None:
    """Upper end of Clopper and Pearson's one-sided 95 % interval for a share (Biometrika 26, 1934).

    Args:
        found: Rows that drift.
        drawn: Rows compared.
        of: Rows that could be drawn; where all were, the share is known.

    >>> round(upper_bound(0, 299, 10_000), 4)
    0.01
    """
    if drawn == 0:
        return None
    if drawn >= of or found == drawn:
        return found / drawn
    from scipy.stats import beta

    return float(beta.ppf(CONFIDENCE, found + 1, drawn - found))


def control(again: Recomputer, rows: Sequence[int]) -> Control:
    """Whether prompts that name nothing in a medical image find as much as the store's own.

    Passes if the median over samples of their mean mass over the real regions' mean mass is at most .25; a
    grounder that refuses them by name passes by refusing.
    """
    if again.store.grounder == "oracle":
        return Control("unrecomputable", "regions come from labels, not from words")
    if again.parts.described["grounder"]["identity"].get("reads_words") is False:
        return Control("unrecomputable", "this grounder reads no words, by design: any prompt finds the same")
    asked = tuple(Region(text, (text,)) for text in CONTROLS)
    accepted = []
    for region in asked:
        try:
            again.parts.grounder.check([region])
            accepted.append(region)
        except PromptError:
            continue
    if not accepted:
        return Control("identical", f"all {len(asked)} unrelated prompts are refused by name")
    ratios = []
    places = np.linspace(0, len(rows) - 1, min(CONTROL_ROWS, len(rows))).round().astype(int)
    for place in dict.fromkeys(places.tolist()):
        try:
            real = float(again.store.maps([rows[place]])[0].mean())
        except CorruptError:
            continue
        found = again.ask(rows[place], accepted) if real > 0 else None
        if found is not None:
            ratios.append(float(found.maps.mean()) / real)
    if not ratios:
        return Control("unrecomputable", "no sample with a region to compare with")
    median = float(np.median(ratios))
    passed = median <= CONTROL_MAX
    told = (
        f"unrelated prompts ('{accepted[0].name}', ...) find {median:.0%} of what the store's own find, median of "
        f"{len(ratios)} samples, at most {CONTROL_MAX:.0%} expected"
    )
    return Control("identical" if passed else "drift", told, median, len(ratios))


def _verdict(store: RegionStore, row: int, made: Made) -> RowVerdict:
    sample = store.samples[row]
    if made.lies:
        return RowVerdict(row, sample.sample_id, "drift", made.problem or "")
    if made.answer is None:
        return RowVerdict(row, sample.sample_id, "unrecomputable", made.problem or "")
    try:
        kept = store.maps([row])[0], *store.boxes(row)
    except CorruptError as error:
        return RowVerdict(row, sample.sample_id, "corrupt", error.message)
    if same(made.answer, sample):
        return RowVerdict(row, sample.sample_id, "identical")
    within, most, iou, detections = differs_by(kept, made.answer)
    told = f"{1 - within:.2%} of pixels differ by more than 2 of 254 (most {most}), IoU {iou:.3f}"
    told += f"; {detections}" if detections else ""
    if within >= PIXELS_MIN and iou >= OVERLAP_MIN and detections is None:
        return RowVerdict(row, sample.sample_id, "tolerant", told, within, iou)
    if not made.whole:
        told += "; images that shared its model call are not there, so that this may be why"
        return RowVerdict(row, sample.sample_id, "unrecomputable", told, within, iou)
    return RowVerdict(row, sample.sample_id, "drift", told, within, iou)


def _example(store: RegionStore, again: Recomputer, row: int, made: Made) -> Example:
    assert made.answer is not None
    kept = decode_probability(store.maps([row])[0])
    now = decode_probability(made.answer.maps)
    maps = {}
    for name, then, new in zip(store.regions, kept, now, strict=True):
        maps[f"{name}, published"] = then
        maps[f"{name}, again"] = new
        maps[f"{name}, difference"] = np.abs(then - new)
    return Example(store.samples[row].sample_id, again.pixels(row), maps)


def rows_asked(text: str | None) -> int | None:
    """``--rows``: a number, or ``all``.

    Raises:
        UsageError: Neither.
    """
    if text is None:
        return ROWS
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--rows {text}: expected a number of rows, or 'all'")
    return int(text)
