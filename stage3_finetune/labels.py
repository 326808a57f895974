"""The labels table, and splits that never cut through a group.

A table is a CSV with the columns ``sample_id`` (or ``image``) and the task's own (``label``), and optionally ``group``,
``patient`` and ``split`` (train, val or test). A patient is a group whose name is not published: its pseudonym is.
Where the table has neither, the images' own groups count; a sample without any is one of its own, which is right only
where no two samples show the same patient.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from shared.config import digest
from shared.errors import ConfigError, InputMissingError
from shared.pseudonyms import pseudonym
from shared.rng import uniform_u32
from stage3_finetune.contracts import Example, Targets

SPLITS = ("train", "val", "test")
_KEYS = ("sample_id", "image")
_OTHERS = ("group", "patient", "split")
_SHOWN = 8


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
    targets: Targets,
    *,
    known: Mapping[str, str | None],
    classes: Sequence[str] | None,
    val_milli: int,
    test_milli: int,
    fraction_milli: int,
    seed: int,
    names: Mapping[str, str] | None = None,
) -> Labels:
    """Read, check and split labels.

    Args:
        path: Where they are, for messages.
        targets: The task's labels there.
        known: Sample ids of the images -> the group that the image list gives, or None.
        classes: Names in order; None: every label, sorted.
        val_milli: Share of val where the table has no split, in thousandths of the samples.
        test_milli: Share of test, likewise.
        fraction_milli: Share of the training groups that keep their labels, in thousandths.
        seed: Seed of the split.
        names: What the user calls a sample whose id is a pseudonym -> that id; the table may use either.

    Returns:
        The table, every row in one part.

    Raises:
        InputMissingError: No such table; rows whose image does not exist.
        ConfigError: Everything else that is wrong with the table, all rows of a fault at once.
    """
    examples, grouped = targets.read(known, names)
    # Where ids are pseudonyms, a name that matches none may be a patient's: its row is told instead.
    missing = [
        f"row {row}" if names else ascii(example.sample_id)
        for row, example in enumerate(examples, 1)
        if example.sample_id not in known
    ]
    if missing:
        raise InputMissingError(
            f"labels {path}: {len(missing)} of {len(examples)} samples are not among the images: "
            f"{listed(missing, quote=False)}",
            hint=f"ids are the image list's, else relative paths such as {min(known, default='a/1.png')!a}",
        )
    ordered = targets.classes(examples, classes)
    if examples[0].split is None:
        examples = split_by_group(examples, targets.strata, val_milli=val_milli, test_milli=test_milli, seed=seed)
    _check_groups(path, examples)
    _check_parts(path, examples)
    examples = keep_fraction(examples, targets.strata, milli=fraction_milli, seed=seed)
    targets.check(examples, ordered)
    return Labels(ordered, tuple(sorted(examples, key=lambda example: example.sample_id)), grouped)


def read_table(
    path: Path,
    known: Mapping[str, str | None],
    names: Mapping[str, str] | None = None,
    *,
    column: str = "label",
    empty: bool = False,
) -> tuple[list[Example], bool]:
    """Read a labels table as it stands, in file order.

    Args:
        path: The CSV.
        known: Groups by sample id, used where the table has neither ``group`` nor ``patient``.
        names: As for `load_labels`.
        column: Where the label stands.
        empty: Whether a row may have none.

    Returns:
        The rows, and whether every one of them has a group.

    Raises:
        InputMissingError: No such table.
        ConfigError: Unknown or absent columns, empty cells, unknown parts, ids given twice, no rows.
    """
    if not path.is_file():
        raise InputMissingError(f"labels {path}: no such file", hint=f"a CSV with the columns sample_id and {column}")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), restkey="", strict=True)
        columns = list(reader.fieldnames or ())
        key = _check_columns(path, columns, column)
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"labels {path}: not a CSV in UTF-8: {error}") from None
    if not rows:
        raise ConfigError(f"labels {path}: no rows under the header")
    problems = [
        f"line {line}: {fault}" for line, row in rows if (fault := _row_fault(row, columns, column if empty else None))
    ]
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
        examples.append(Example(sample_id, (row[column] or "").strip(), group, row.get("split")))
        lines[sample_id].append(line)
    shown = {name: ascii(name) if name in known or not names else "a sample" for name in lines}
    twice = [f"{shown[name]} in lines {', '.join(map(str, at))}" for name, at in lines.items() if len(at) > 1]
    if twice:
        _refuse(path, [f"samples given more than once: {listed(twice, quote=False)}"])
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


def split_by_group(
    examples: Sequence[Example], strata: Callable[[Example], str], *, val_milli: int, test_milli: int, seed: int
) -> list[Example]:
    """Put whole groups into train, val and test, each stratum about alike.

    A group counts to the stratum that most of its samples have. Inside a stratum, groups are ordered by Philox and
    given to test, then val, while that brings the part's number of samples nearer to its share; the first group
    of each goes there in any case, where two (three) groups leave something for the others. The rest is train.

    Args:
        examples: The rows.
        strata: What is to be spread alike: a row's class.
        val_milli: Share of val in thousandths; 0: no val.
        test_milli: Share of test in thousandths.
        seed: Run seed; a group's place depends on it and on the names and sizes in its stratum.

    Returns:
        The rows with their part, in the same order.
    """
    members = by_group(examples)
    order = drawn_order(members, strata, "finetune/split", seed)
    part = dict.fromkeys(members, "train")
    for groups in order:
        waiting = list(groups)
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


def keep_fraction(
    examples: Sequence[Example], strata: Callable[[Example], str], *, milli: int, seed: int
) -> list[Example]:
    """Keep the labels of a share of the training groups; val and test stay whole.

    Nested: what a smaller share keeps, a larger one of the same seed keeps too. Inside a stratum, groups are taken in
    an order drawn by Philox until their samples come nearest to the share; the first one always.

    Args:
        examples: Split rows.
        strata: As for `split_by_group`.
        milli: Share in thousandths of each stratum's training samples; 1000: all.
        seed: Run seed.
    """
    if milli == 1000:
        return list(examples)
    members = by_group([example for example in examples if example.split == "train"])
    kept = set()
    for groups in drawn_order(members, strata, "finetune/fraction", seed):
        samples, taken = sum(len(members[group]) for group in groups), 0
        for group in groups:
            size = len(members[group])
            if taken and 1000 * (2 * taken + size) > 2 * milli * samples:
                break
            kept.add(group)
            taken += size
    return [example for example in examples if example.split != "train" or example.group in kept]


def by_group(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The rows of each group."""
    members = defaultdict(list)
    for example in examples:
        members[example.group].append(example)
    return members


def drawn_order(
    members: Mapping[str, Sequence[Example]], strata: Callable[[Example], str], purpose: str, seed: int
) -> list[list[str]]:
    """Groups of each stratum in the order that Philox draws."""
    found = defaultdict(list)
    for group, rows in members.items():
        counts = Counter(map(strata, rows))
        found[min(counts, key=lambda name: (-counts[name], name))].append(group)
    return [
        sorted(groups, key=lambda group: (int(uniform_u32(purpose, seed, group, 0, 1)[0]), group))
        for groups in found.values()
    ]


def _check_columns(path: Path, columns: list[str], column: str) -> str:
    unknown = [name for name in columns if name not in (*_KEYS, column, *_OTHERS)]
    keys = [name for name in _KEYS if name in columns]
    hint = f"columns: sample_id (or image), {column}, and optionally group, patient and split"
    if unknown:
        raise ConfigError(f"labels {path}: unknown columns: {listed(unknown)}", hint=hint)
    if len(keys) != 1 or column not in columns or len(set(columns)) < len(columns):
        raise ConfigError(f"labels {path}: found the columns {listed(columns) or 'none'}", hint=hint)
    return keys[0]


def _row_fault(row: Mapping[str, str | None], columns: Sequence[str], optional: str | None) -> str | None:
    empty = [name for name in columns if name != optional and not (row[name] or "").strip()]
    if empty:
        return f"no value for {', '.join(empty)}"
    if "" in row:
        return "more cells than the header"
    if "split" in columns and row["split"] not in SPLITS:
        return f"split {row['split']!a} is none of {', '.join(SPLITS)}"
    return None


def _check_groups(path: Path, examples: Sequence[Example]) -> None:
    parts = defaultdict(set)
    for example in examples:
        parts[example.group].add(str(example.split))
    torn = [f"{group!a} in {' and '.join(sorted(found))}" for group, found in parts.items() if len(found) > 1]
    if torn:
        raise ConfigError(
            f"labels {path}: {len(torn)} groups are on two sides of the split: {listed(torn, quote=False)}",
            hint="keep a group (a patient) in one part; scores would come out too high",
        )


def _check_parts(path: Path, examples: Sequence[Example]) -> None:
    empty = [split for split in ("train", "test") if all(example.split != split for example in examples)]
    if empty:
        raise ConfigError(
            f"labels {path}: nothing in {' and '.join(empty)}", hint="more groups are needed, or a column 'split'"
        )


def listed(names: Sequence[str], *, quote: bool = True) -> str:
    """Some names for a message, and how many more there are."""
    shown = ", ".join(ascii(name) if quote else name for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _refuse(path: Path, problems: Sequence[str]) -> NoReturn:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(f"labels {path}: {'; '.join(problems[:_SHOWN])}{more}")
