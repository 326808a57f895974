"""The labels table, and splits that never cut through a group.

A table is a CSV with the columns ``sample_id`` (or ``image``) and ``label``, and optionally ``group``, ``patient`` and
``split`` (train, val or test). A patient is a group whose name is not published: its pseudonym is. Where the table
has neither, the images' own groups count; a sample without any is one of its own, which is right only where no two
samples show the same patient.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from shared.config import digest
from shared.errors import ConfigError, InputMissingError
from shared.pseudonyms import pseudonym
from shared.rng import uniform_u32

SPLITS = ("train", "val", "test")
_KEYS = ("sample_id", "image")
_COLUMNS = (*_KEYS, "label", "group", "patient", "split")
_SHOWN = 8


@dataclass(frozen=True)
class Example:
    """One row: a sample, its label, the group it belongs to and its part (None: not yet split)."""

    sample_id: str
    label: str
    group: str
    split: str | None = None


@dataclass(frozen=True)
class Labels:
    """A table that is ready to train on.

    Attributes:
        classes: Class names; a label's index in it is the class's number.
        examples: Every row, split, sorted by sample id.
        grouped: Whether every sample has a group; one without counts as its own.
    """

    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    grouped: bool

    def part(self, split: str) -> tuple[Example, ...]:
        """The rows of train, val or test."""
        return tuple(example for example in self.examples if example.split == split)

    @property
    def alone(self) -> bool:
        """Whether no two samples share a group."""
        return len({example.group for example in self.examples}) == len(self.examples)

    @property
    def caution(self) -> str | None:
        """What a reader of the scores should know of the groups; None where every sample has one."""
        if self.grouped:
            return None
        lack = "no groups: each sample" if self.alone else "not all samples have a group: one without"
        return f"{lack} counts as its own; scores are too high if two show one patient"

    @property
    def sha256(self) -> str:
        """Digest of classes and rows, parts included."""
        rows = [[example.sample_id, example.label, example.group, example.split] for example in self.examples]
        return digest({"classes": self.classes, "rows": rows})

    def line(self) -> str:
        """Counts of each part, for a log."""
        parts = [(split, self.part(split)) for split in SPLITS]
        unit = "groups" if self.grouped or not self.alone else "groups of one sample"
        counts = [f"{split} {len(rows)} in {len({row.group for row in rows})} {unit}" for split, rows in parts if rows]
        return f"{len(self.classes)} classes; {', '.join(counts)}"


def load_labels(
    path: Path,
    *,
    known: Mapping[str, str | None],
    classes: Sequence[str] | None,
    val_milli: int,
    test_milli: int,
    seed: int,
    names: Mapping[str, str] | None = None,
) -> Labels:
    """Read, check and split a labels table.

    Args:
        path: The CSV.
        known: Sample ids of the images -> the group that the image list gives, or None.
        classes: Names in order; None: every label of the table, sorted.
        val_milli: Share of val where the table has no split, in thousandths of the samples.
        test_milli: Share of test, likewise.
        seed: Seed of the split.
        names: What the user calls a sample whose id is a pseudonym -> that id; the table may use either.

    Returns:
        The table, every row in one part.

    Raises:
        InputMissingError: No such table; rows whose image does not exist.
        ConfigError: Everything else that is wrong with the table, all rows of a fault at once.
    """
    examples, grouped = read_table(path, known, names)
    # Where ids are pseudonyms, a name that matches none may be a patient's: its row is told instead.
    missing = [
        f"row {row}" if names else ascii(example.sample_id)
        for row, example in enumerate(examples, 1)
        if example.sample_id not in known
    ]
    if missing:
        raise InputMissingError(
            f"labels {path}: {len(missing)} of {len(examples)} samples are not among the images: "
            f"{_listed(missing, quote=False)}",
            hint=f"ids are the image list's, else relative paths such as {min(known, default='a/1.png')!a}",
        )
    ordered = _classes(path, examples, classes)
    if examples[0].split is None:
        examples = split_by_group(examples, val_milli=val_milli, test_milli=test_milli, seed=seed)
    _check_groups(path, examples)
    _check_parts(path, examples, ordered)
    return Labels(ordered, tuple(sorted(examples, key=lambda example: example.sample_id)), grouped)


def read_table(
    path: Path, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
) -> tuple[list[Example], bool]:
    """Read a labels table as it stands, in file order.

    Args:
        path: The CSV.
        known: Groups by sample id, used where the table has neither ``group`` nor ``patient``.
        names: As for `load_labels`.

    Returns:
        The rows, and whether every one of them has a group.

    Raises:
        InputMissingError: No such table.
        ConfigError: Unknown or absent columns, empty cells, unknown parts, ids given twice, no rows.
    """
    if not path.is_file():
        raise InputMissingError(f"labels {path}: no such file", hint="a CSV with the columns sample_id and label")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), restkey="", strict=True)
        columns = list(reader.fieldnames or ())
        key = _check_columns(path, columns)
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"labels {path}: not a CSV in UTF-8: {error}") from None
    if not rows:
        raise ConfigError(f"labels {path}: no rows under the header")
    problems = [f"line {line}: {fault}" for line, row in rows if (fault := _row_fault(row, columns))]
    if problems:
        _refuse(path, problems)
    examples, lines, patients = [], defaultdict(list), _Patients()
    for line, row in rows:
        given = unicodedata.normalize("NFC", row[key])
        sample_id = (names or {}).get(given, given)
        # Stripped like the label: "patient1 " in test beside "patient1" in train would be a leak.
        group = unicodedata.normalize("NFC", row.get("group") or "").strip()
        patient = pseudonym("patient", row["patient"]) if "patient" in columns else ""
        patients.note(line, patient, group, known.get(sample_id) or "")
        group = group or patient or known.get(sample_id) or sample_id
        examples.append(Example(sample_id, row["label"].strip(), group, row.get("split")))
        lines[sample_id].append(line)
    shown = {name: ascii(name) if name in known or not names else "a sample" for name in lines}
    twice = [f"{shown[name]} in lines {', '.join(map(str, at))}" for name, at in lines.items() if len(at) > 1]
    if twice:
        _refuse(path, [f"samples given more than once: {_listed(twice, quote=False)}"])
    if patients.problems:
        _refuse(path, patients.problems)
    grouped = {"group", "patient"} & set(columns) or all(known.get(example.sample_id) for example in examples)
    return examples, bool(grouped)


class _Patients:
    """What a table says of patients, held against its groups and against what the images say."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._groups: dict[str, tuple[str, int]] = {}

    def note(self, line: int, patient: str, group: str, known: str) -> None:
        if patient and known.startswith("patient-") and known != patient:
            self.problems.append(f"line {line}: another patient than the images' own")
        if not patient and known.startswith(("patient-", "study-")):
            patient = known
        if patient and group:
            other, first = self._groups.setdefault(patient, (group, line))
            if other != group:
                self.problems.append(f"lines {first} and {line} put one patient into two groups")


def split_by_group(examples: Sequence[Example], *, val_milli: int, test_milli: int, seed: int) -> list[Example]:
    """Put whole groups into train, val and test, each class about alike.

    A group counts to the class that most of its samples have. Inside a class, groups are ordered by Philox and
    given to test, then val, while that brings the part's number of samples nearer to its share; the first group
    of each goes there in any case, where two (three) groups leave something for the others. The rest is train.

    Args:
        examples: The rows.
        val_milli: Share of val in thousandths; 0: no val.
        test_milli: Share of test in thousandths.
        seed: Run seed; a group's place depends on it and on the names and sizes in its class.

    Returns:
        The rows with their part, in the same order.
    """
    members = defaultdict(list)
    for example in examples:
        members[example.group].append(example)
    strata = defaultdict(list)
    for group, rows in members.items():
        counts = Counter(row.label for row in rows)
        strata[min(counts, key=lambda label: (-counts[label], label))].append(group)
    part = dict.fromkeys(members, "train")
    for groups in strata.values():
        waiting = sorted(groups, key=lambda group: (int(uniform_u32("finetune/split", seed, group, 0, 1)[0]), group))
        samples = sum(len(members[group]) for group in groups)
        kept_back = 2 if val_milli and len(groups) > 2 else 1
        for split, milli, least in (("test", test_milli, kept_back), ("val", val_milli, 1)):
            taken, number = 0, 0
            while milli and len(waiting) > least:
                size = len(members[waiting[0]])
                if number and 1000 * (2 * taken + size) > 2 * milli * samples:
                    break
                part[waiting.pop(0)] = split
                taken, number = taken + size, number + 1
    return [replace(example, split=part[example.group]) for example in examples]


def _check_columns(path: Path, columns: list[str]) -> str:
    unknown = [name for name in columns if name not in _COLUMNS]
    keys = [name for name in _KEYS if name in columns]
    hint = "columns: sample_id (or image), label, and optionally group, patient and split"
    if unknown:
        raise ConfigError(f"labels {path}: unknown columns: {_listed(unknown)}", hint=hint)
    if len(keys) != 1 or "label" not in columns or len(set(columns)) < len(columns):
        raise ConfigError(f"labels {path}: found the columns {_listed(columns) or 'none'}", hint=hint)
    return keys[0]


def _row_fault(row: Mapping[str, str | None], columns: Sequence[str]) -> str | None:
    empty = [name for name in columns if not (row[name] or "").strip()]
    if empty:
        return f"no value for {', '.join(empty)}"
    if "" in row:
        return "more cells than the header"
    if "split" in columns and row["split"] not in SPLITS:
        return f"split {row['split']!a} is none of {', '.join(SPLITS)}"
    return None


def _classes(path: Path, examples: Sequence[Example], classes: Sequence[str] | None) -> tuple[str, ...]:
    present = {example.label for example in examples}
    if classes is None:
        classes = sorted(present)
    if unknown := sorted(present - set(classes)):
        raise ConfigError(
            f"labels {path}: labels that 'classes' does not name: {_listed(unknown)}",
            hint=f"classes: {', '.join(classes)}; drop those rows or name the labels",
        )
    if absent := [name for name in classes if name not in present]:
        raise ConfigError(f"labels {path}: no row has the classes {_listed(absent)}")
    if len(classes) < 2:
        raise ConfigError(f"labels {path}: one class only, {classes[0]!a}; a classifier needs two")
    return tuple(classes)


def _check_groups(path: Path, examples: Sequence[Example]) -> None:
    parts = defaultdict(set)
    for example in examples:
        parts[example.group].add(str(example.split))
    torn = [f"{group!a} in {' and '.join(sorted(found))}" for group, found in parts.items() if len(found) > 1]
    if torn:
        raise ConfigError(
            f"labels {path}: {len(torn)} groups are on two sides of the split: {_listed(torn, quote=False)}",
            hint="keep a group (a patient) in one part; scores would come out too high",
        )


def _check_parts(path: Path, examples: Sequence[Example], classes: Sequence[str]) -> None:
    labels = {split: {example.label for example in examples if example.split == split} for split in SPLITS}
    empty = [split for split in ("train", "test") if not labels[split]]
    if empty:
        raise ConfigError(
            f"labels {path}: nothing in {' and '.join(empty)}", hint="more groups are needed, or a column 'split'"
        )
    if unseen := [name for name in classes if name not in labels["train"]]:
        raise ConfigError(f"labels {path}: classes without a training sample: {_listed(unseen)}")


def _listed(names: Sequence[str], *, quote: bool = True) -> str:
    shown = ", ".join(ascii(name) if quote else name for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _refuse(path: Path, problems: Sequence[str]) -> NoReturn:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(f"labels {path}: {'; '.join(problems[:_SHOWN])}{more}")
