import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.artifact import CARD, Input, open_artifact, publish, published_files, read_card, spec_digest, verify
from shared.errors import CorruptError, IncompatibleError, InputMissingError, LockedError, UsageError
from shared.lease import Lease


def make(folder: Path, spec: dict | None = None) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data.txt").write_text("data")
    (folder / "run").mkdir()
    (folder / "run" / "run.log").write_text("log")
    publish(folder, kind="corpus", inputs=[], spec=spec or {"a": 1}, outputs={"n": 2}, metrics={"loss": 0.5})
    return folder


def reseal(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a card and compute its own digest anew, as another release or a forger would."""
    body = json.loads((folder / CARD).read_bytes())
    change(body)
    del body["card_sha256"]
    body["card_sha256"] = hashlib.sha256(rfc8785.dumps(body)).hexdigest()
    (folder / CARD).write_bytes(rfc8785.dumps(body))


def test_only_the_lease_itself_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "lease.json").mkdir()
    (tmp_path / "lease.json/more").write_text("x")
    assert list(published_files(tmp_path, "encoder")) == ["lease.json/more"]


def test_published_and_read_back(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    card = read_card(folder, "corpus")
    assert card.identity.outputs == {"n": 2}
    assert set(card.provenance.files) == {"sub/data.txt"}
    assert "Not for diagnosis" in card.provenance.notice
    assert verify(folder, card) == []
    assert open_artifact(f"{folder}@sha256:{card.artifact_id}", "corpus")[1] == card


def test_what_a_kill_left_of_an_atomic_write_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / ".data.txt.123.tmp").write_text("half")
    card = publish(tmp_path / "a", kind="corpus", inputs=[], spec={}, outputs={})
    assert card.provenance.files == {}
    assert not list((tmp_path / "a" / "sub").iterdir())


def test_files_and_folders_are_on_disk_before_the_card_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    before: list[set[int]] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *names: (before.append(set(synced)), replace(*names)))
    folder = make(tmp_path / "a")
    assert len(before) == 1
    assert {path.stat().st_ino for path in (folder / "sub" / "data.txt", folder / "sub", folder)} <= before[0]


def test_the_id_knows_what_it_is_and_not_when_or_where(tmp_path: Path) -> None:
    first, second = read_card(make(tmp_path / "a")), read_card(make(tmp_path / "elsewhere"))
    assert first.artifact_id == second.artifact_id
    assert read_card(make(tmp_path / "c", {"a": 2})).artifact_id != first.artifact_id


def test_what_is_published_is_never_edited(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with pytest.raises(UsageError, match="already published"):
        publish(folder, kind="corpus", inputs=[], spec={}, outputs={})


def test_changed_missing_and_unlisted_files_are_found_and_logs_are_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    card = read_card(folder)
    (folder / "run" / "run.log").write_text("more")
    assert verify(folder, card) == []
    (folder / "sub" / "data.txt").write_text("dato")
    (folder / "extra").write_text("x")
    assert {(item.file, item.problem) for item in verify(folder, card)} == {
        ("sub/data.txt", "changed since it was published"),
        ("extra", "not listed on the card"),
    }
    (folder / "sub" / "data.txt").unlink()
    assert ("sub/data.txt", "missing") in {(item.file, item.problem) for item in verify(folder, card)}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_of_a_card_is_caught(tmp_path_factory, data) -> None:
    folder = make(tmp_path_factory.mktemp("card") / "a")
    raw = bytearray((folder / CARD).read_bytes())
    place = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[place // 8] ^= 1 << (place % 8)
    (folder / CARD).write_bytes(raw)
    with pytest.raises(CorruptError, match=CARD):
        read_card(folder, "corpus")


DEEP = b'{"a":' * 900 + b"1" + b"}" * 900


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"identity": 3}', DEEP, b'{"a":1e999,"card_sha256":""}',
        b'{"a":123456789012345678901234567890}', b'{"a":"\\ud800"}', b" " * ((64 << 20) + 1),
    ],
    ids=["empty", "list", "object", "endless", "binary", "no identity", "deep", "infinite", "huge number",
         "half a character", "oversized"],
)  # fmt: skip
def test_what_is_no_card(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / CARD).write_bytes(raw)
    with pytest.raises(CorruptError, match=CARD):
        read_card(tmp_path)


@pytest.mark.parametrize(("kind", "version"), [("corpus", "2.0"), ("corpus", "1.9"), ("future", "1.0")])
def test_unknown_kinds_and_versions_are_incompatible(tmp_path: Path, kind: str, version: str) -> None:
    folder = make(tmp_path / "a")
    reseal(folder, lambda body: body["identity"].update({"kind": kind, "kind_version": version}))
    with pytest.raises(IncompatibleError):
        read_card(folder)


@pytest.mark.parametrize(("old", "new"), [(b'"kind":"corpus"', b'"kind":"corpuq"'), (b'"1.0"', b'"1.1"')])
def test_a_damaged_kind_or_version_is_no_newer_release(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = make(tmp_path / "a")
    raw = (folder / CARD).read_bytes()
    (folder / CARD).write_bytes(raw.replace(old, new, 1))
    with pytest.raises(CorruptError, match=r"artifact\.json: changed since"):
        read_card(folder)


def test_an_id_that_was_forged_with_its_seal(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    reseal(folder, lambda body: body["identity"]["outputs"].update(n=3))
    with pytest.raises(CorruptError, match="id does not belong to its content"):
        read_card(folder)


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with pytest.raises(InputMissingError):
        open_artifact(tmp_path / "none", "corpus")
    with pytest.raises(IncompatibleError, match="found kind 'corpus'"):
        open_artifact(folder, "encoder")
    with pytest.raises(IncompatibleError, match="pinned"):
        open_artifact(f"{folder}@sha256:{'0' * 64}", "corpus")
    (tmp_path / "b").mkdir()
    with pytest.raises(IncompatibleError, match="not published"):
        open_artifact(tmp_path / "b", "corpus")
    with Lease(tmp_path / "b"), pytest.raises(LockedError):
        open_artifact(tmp_path / "b", "corpus")


def test_the_spec_digest_is_known_before_the_run(tmp_path: Path) -> None:
    card = read_card(make(tmp_path / "a"))
    assert card.spec_digest == spec_digest([], {"a": 1})
    assert card.spec_digest != spec_digest([Input(role="r", kind="corpus", artifact_id="0")], {"a": 1})
