"""The labels table: what is refused, and splits that keep groups whole."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, InputMissingError
from shared.pseudonyms import pseudonym
from stage3_finetune.contracts import Example
from stage3_finetune.labels import Labels, keep_fraction, load_labels, split_by_group
from stage3_finetune.tasks.classify import ClassTargets

from .conftest import CLASSES, rows

KNOWN = {row["sample_id"]: None for row in rows()}


def read(
    path: Path,
    known: dict[str, str | None] | None = None,
    classes: tuple[str, ...] | None = None,
    milli: int = 1000,
) -> Labels:
    return load_labels(
        path, ClassTargets(path), known=known or KNOWN, classes=classes, val_milli=150, test_milli=200,
        fraction_milli=milli, seed=0,
    )  # fmt: skip


def test_reads_a_table_with_groups_and_parts(table) -> None:
    labels = read(table())
    assert labels.classes == CLASSES
    assert {split: len(labels.part(split)) for split in ("train", "val", "test")} == {"train": 36, "val": 9, "test": 9}
    assert labels.line() == "3 classes; train 36 in 12 groups, val 9 in 3 groups, test 9 in 3 groups"


def test_image_is_another_name_of_sample_id_and_row_order_does_not_matter(table) -> None:
    expected = read(table()).sha256
    renamed = [{**row, "image": row["sample_id"]} for row in reversed(rows())]
    assert read(table(renamed, ("image", "split", "label", "group"))).sha256 == expected


def test_the_digest_covers_labels_groups_and_parts(table) -> None:
    expected = read(table()).sha256
    for key, value in (("label", "grey"), ("group", "other"), ("split", "val")):
        changed = rows()
        changed[0] = {**changed[0], key: value, **({"group": "alone"} if key == "split" else {})}
        assert read(table(changed)).sha256 != expected


def test_missing_table(tmp_path) -> None:
    with pytest.raises(InputMissingError, match="no such file"):
        read(tmp_path / "absent.csv")


def test_missing_images_are_listed_at_once(table) -> None:
    known = {name: None for name in KNOWN if name not in ("dark00.png", "light17.png")}
    with pytest.raises(InputMissingError) as caught:
        read(table(), known)
    assert "2 of 54 samples" in caught.value.message
    assert "'dark00.png', 'light17.png'" in caught.value.message


def test_duplicate_rows_are_named_with_their_lines(table) -> None:
    with pytest.raises(ConfigError, match=r"more than once: 'dark00.png' in lines 2, 56"):
        read(table([*rows(), rows()[0]]))


def test_absent_cells_and_unknown_parts_are_all_listed(table) -> None:
    broken = rows()
    broken[0]["label"] = " "
    broken[1]["group"] = ""
    broken[2]["split"] = "dev"
    with pytest.raises(ConfigError) as caught:
        read(table(broken))
    assert "line 2: no value for label" in caught.value.message
    assert "line 3: no value for group" in caught.value.message
    assert "line 4: split 'dev' is none of train, val, test" in caught.value.message


@pytest.mark.parametrize("columns", [("sample_id", "label", "groups"), ("label", "group"), ("sample_id", "group")])
def test_columns_that_are_unknown_or_absent_are_refused(table, columns) -> None:
    with pytest.raises(ConfigError, match="columns"):
        read(table([{**row, "groups": "a"} for row in rows()], columns))


def test_labels_outside_the_configured_classes_and_classes_without_rows(table) -> None:
    with pytest.raises(ConfigError, match="does not name: 'grey', 'light'"):
        read(table(), classes=("dark", "black"))
    with pytest.raises(ConfigError, match="no row has the classes 'black', 'white'"):
        read(table(), classes=(*CLASSES, "black", "white"))
    assert read(table(), classes=CLASSES[::-1]).classes == CLASSES[::-1]


def test_one_class_only(table) -> None:
    with pytest.raises(ConfigError, match="one class only, 'dark'"):
        read(table([row for row in rows() if row["label"] == "dark"]))


def test_a_group_on_two_sides_is_named(table) -> None:
    torn = rows()
    torn[0]["split"] = "test"
    with pytest.raises(ConfigError, match=r"1 groups are on two sides.*'dark-patient0' in test and train"):
        read(table(torn))


def test_nothing_to_train_or_test_on(table) -> None:
    with pytest.raises(ConfigError, match="nothing in test"):
        read(table([row for row in rows() if row["split"] != "test"]))
    with pytest.raises(ConfigError, match="without a training sample: 'dark'"):
        read(table([row for row in rows() if row["label"] != "dark" or row["split"] != "train"]))


def test_groups_come_from_the_image_list_if_the_table_has_none(table) -> None:
    columns = ("sample_id", "label")
    assert not read(table(columns=columns)).grouped
    known = {row["sample_id"]: row["group"] for row in rows()}
    labels = read(table(columns=columns), known)
    assert labels.grouped
    assert len({example.group for example in labels.examples}) == 18


def test_not_text(tmp_path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a CSV"):
        read(path)


def label_of(example: Example) -> str:
    return example.label


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 5))
def test_a_smaller_share_of_labels_is_part_of_a_larger_one(low, high, seed) -> None:
    low, high = sorted((low, high))
    sizes = [(label, number, 1 + number % 4) for label in "ab" for number in range(9)]
    examples = [
        Example(f"{label}{number}-{n}", label, f"{label}{number}", "test" if number == 8 else "train")
        for label, number, size in sizes
        for n in range(size)
    ]
    few, many = (keep_fraction(examples, label_of, milli=milli, seed=seed) for milli in (low, high))
    assert set(few) <= set(many) <= set(examples)
    assert {e for e in examples if e.split == "test"} <= set(few)
    train = [e for e in few if e.split == "train"]
    assert {e.label for e in train} == {"a", "b"}
    for label in "ab":
        own = sum(e.label == label and e.split == "train" for e in examples)
        kept = sum(e.label == label for e in train)
        assert abs(kept - own * low / 1000) <= 4 or kept <= 4
        groups_whole = {e.group for e in train if e.label == label}
        assert kept == sum(e.group in groups_whole for e in examples)
    assert keep_fraction(examples, label_of, milli=1000, seed=seed) == examples


def test_a_share_of_the_labels_leaves_val_and_test(table) -> None:
    labels = read(table(), milli=340)
    assert {split: len(labels.part(split)) for split in ("train", "val", "test")} == {"train": 9, "val": 9, "test": 9}
    other = rows()
    assert read(table(other), milli=340).sha256 == labels.sha256


groups = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.tuples(st.sampled_from("xyz"), st.integers(1, 9)), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(0, 3), st.integers(0, 400), st.integers(1, 400))
def test_splits_keep_groups_whole_and_train_never_loses_a_class(sizes, seed, val_milli, test_milli) -> None:
    examples = [
        Example(f"{group}-{number}", label, group) for group, (label, size) in sizes.items() for number in range(size)
    ]
    split = split_by_group(examples, label_of, val_milli=val_milli, test_milli=test_milli, seed=seed)
    assert [(e.sample_id, e.label, e.group) for e in split] == [(e.sample_id, e.label, e.group) for e in examples]
    assert all(len({e.split for e in split if e.group == group}) == 1 for group in sizes)
    again = split_by_group(examples[::-1], label_of, val_milli=val_milli, test_milli=test_milli, seed=seed)
    assert again[::-1] == split
    for label in {label for label, _ in sizes.values()}:
        own = {group for group, (its, _) in sizes.items() if its == label}
        parts = {e.split for e in split if e.label == label}
        assert "train" in parts
        assert ("test" in parts) == (len(own) > 1)
        assert ("val" in parts) == (len(own) > 2 and val_milli > 0)


def test_shares_are_met_class_by_class_and_the_seed_matters() -> None:
    examples = [
        Example(f"{c}{g}-{n}", c, f"{c}{g}") for c, many in (("a", 40), ("b", 80)) for g in range(many) for n in "12"
    ]
    split = split_by_group(examples, label_of, val_milli=150, test_milli=200, seed=0)
    counts = Counter((e.label, e.split) for e in split)
    assert {key: counts[key] for key in counts if key[1] != "train"} == {
        ("a", "test"): 16, ("a", "val"): 12, ("b", "test"): 32, ("b", "val"): 24,
    }  # fmt: skip
    assert split_by_group(examples, label_of, val_milli=150, test_milli=200, seed=1) != split


def write(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def load(path: Path, known: dict[str, str | None], names: dict[str, str] | None = None) -> Labels:
    return load_labels(
        path, ClassTargets(path), known=known, names=names, classes=None, val_milli=0, test_milli=300,
        fraction_milli=1000, seed=0,
    )  # fmt: skip


def test_patients_are_groups_by_pseudonym_and_agree_with_the_images(tmp_path: Path) -> None:
    rows = [(f"{n}.png", "ab"[n % 2], f"MRN-{n // 2}") for n in range(12)]
    text = "sample_id,label,patient\n" + "".join(",".join(row) + "\n" for row in rows)
    known = {name: pseudonym("patient", patient) for name, _, patient in rows}
    labels = load(write(tmp_path, text), known)
    assert labels.grouped
    assert {e.sample_id: e.group for e in labels.examples} == known
    assert labels.sha256 == load(write(tmp_path, text), dict.fromkeys(known)).sha256
    with pytest.raises(ConfigError, match="line 2: another patient than the images' own") as caught:
        load(write(tmp_path, text.replace("MRN-0", "MRN-9", 1)), known)
    assert "MRN" not in str(caught.value)


def test_a_patient_in_two_groups_is_refused_by_lines(tmp_path: Path) -> None:
    text = "sample_id,label,group,patient\n1,a,g,DOE\n2,b,h,DOE\n3,a,i,ROE\n4,b,j,POE\n"
    with pytest.raises(ConfigError, match="lines 2 and 3 put one patient into two groups") as caught:
        load(write(tmp_path, text), dict.fromkeys("1234"))
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("kind", ["patient", "study"])
def test_groups_of_the_table_cannot_cut_through_a_patient_that_the_images_name(tmp_path: Path, kind: str) -> None:
    known: dict[str, str | None] = {str(n): f"{kind}-{n // 2}" for n in range(8)}
    rows = [f"{n},{'ab'[n // 2 % 2]},g{n // 2},{'test' if n < 4 else 'train'}" for n in range(8)]
    text = "sample_id,label,group,split\n"
    assert load(write(tmp_path, text + "\n".join(rows)), known).grouped
    rows[1] = "1,a,g9,train"
    with pytest.raises(ConfigError, match="lines 2 and 3 put one patient into two groups"):
        load(write(tmp_path, text + "\n".join(rows)), known)


def test_a_table_may_use_the_names_behind_pseudonyms_and_errors_do_not(tmp_path: Path) -> None:
    names = {f"DOE_{n}/1.dcm": f"dicom-{n}" for n in range(8)}
    known: dict[str, str | None] = {sample_id: f"patient-{sample_id}" for sample_id in names.values()}
    text = "image,label\n" + "".join(f"{name},{'ab'[n % 2]}\n" for n, name in enumerate(names))
    labels = load(write(tmp_path, text), known, names)
    assert {example.sample_id for example in labels.examples} == set(known)
    assert labels.grouped
    for bad in ("DOE_9/1.dcm,a\n", "DOE_9/1.dcm,a\nDOE_9/1.dcm,b\n", "DOE_0/1.dcm,a\n"):
        with pytest.raises((InputMissingError, ConfigError)) as caught:
            load(write(tmp_path, text + bad), known, names)
        assert "DOE" not in str(caught.value)


def test_groups_of_some_images_still_hold(tmp_path: Path) -> None:
    known = {str(n): "patient-one" if n < 4 else None for n in range(12)}
    labels = load(write(tmp_path, "sample_id,label\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(12))), known)
    assert not labels.grouped
    assert (labels.caution or "").startswith("not all samples have a group")
    assert "of one sample" not in labels.line()
    assert len({example.split for example in labels.examples if example.group == "patient-one"}) == 1
    assert sum(example.group == "patient-one" for example in labels.examples) == 4
