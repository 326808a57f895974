"""A corpus is its ids and source bytes: the same ones give the same id, wherever they lie."""

import shutil
from pathlib import Path

import pytest

from shared.artifact import read_card, verify
from shared.corpus import corpus_id, list_corpus, open_corpus, write_corpus
from shared.errors import CorruptError, IncompatibleError, InputMissingError, UsageError
from shared.images import find_sources
from tests.shared.test_images import picture


def make(root: Path) -> Path:
    for number, name in enumerate(("b.png", "a.png", "c/d.png")):
        picture(root / name, 10 * number)
    return root


def test_the_same_images_give_the_same_id(tmp_path: Path) -> None:
    rows = list_corpus(find_sources(make(tmp_path / "one")))
    assert [row.sample_id for row in rows] == ["a.png", "b.png", "c/d.png"]
    card = write_corpus(tmp_path / "corpus", rows)
    assert card.artifact_id == corpus_id(rows)
    assert not verify(tmp_path / "corpus", card)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    again = list_corpus(find_sources(tmp_path / "two"))
    assert write_corpus(tmp_path / "other", again).artifact_id == card.artifact_id
    assert open_corpus(tmp_path / "corpus") == (card, rows)


def test_bytes_ids_and_groups_enter_the_id(tmp_path: Path) -> None:
    home = make(tmp_path)
    (home / "list.csv").write_text("image,sample_id,group\na.png,s1,g\nb.png,s2,g\n")
    first = corpus_id(list_corpus(find_sources(home / "list.csv")))
    for text in ("a.png,s1,g\nb.png,s3,g\n", "a.png,s1,g\nb.png,s2,h\n", "a.png,s2,g\nb.png,s1,g\n", "a.png,s1,g\n"):
        (home / "list.csv").write_text("image,sample_id,group\n" + text)
        assert corpus_id(list_corpus(find_sources(home / "list.csv"))) != first


def test_an_interrupted_attempt_is_cleared_and_a_published_one_kept(tmp_path: Path) -> None:
    rows = list_corpus(find_sources(make(tmp_path / "images")))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / ".samples.jsonl.12.tmp").write_bytes(b"half")
    (folder / "samples.jsonl").write_bytes(b"half")
    card = write_corpus(folder, rows)
    assert set(card.provenance.files) == {"samples.jsonl"}
    with pytest.raises(UsageError):
        write_corpus(folder, rows)
    assert read_card(folder, "corpus") == card


def test_damage_and_pins(tmp_path: Path) -> None:
    rows = list_corpus(find_sources(make(tmp_path / "images")))
    folder = tmp_path / "corpus"
    card = write_corpus(folder, rows)
    assert open_corpus(f"{folder}@sha256:{card.artifact_id}")[1] == rows
    with pytest.raises(IncompatibleError):
        open_corpus(f"{folder}@sha256:{'0' * 64}")
    lines = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(lines.replace(b"a.png", b"z.png"))
    with pytest.raises(CorruptError):
        open_corpus(folder)
    (folder / "samples.jsonl").unlink()
    with pytest.raises(CorruptError):
        open_corpus(folder)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    sources = find_sources(make(tmp_path))
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputMissingError, match=r"b\.png") as caught:
        list_corpus(sources)
    assert str(tmp_path) not in str(caught.value)
