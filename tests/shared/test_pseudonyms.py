"""Pseudonyms: the same salt, the same names; the salt is made once, privately, and stays where it is."""

import hmac
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import InputMissingError, UsageError
from shared.pseudonyms import _make, pseudonym, salt_path, unsalted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MWM_SALT_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_a_name_is_an_hmac_of_kind_and_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "salt").write_text("ab" * 32 + "\n")
    monkeypatch.setenv("MWM_SALT_FILE", str(home / "salt"))
    expected = hmac.new(b"\xab" * 32, b"patient\0MRN 7", "sha256").hexdigest()
    assert pseudonym("patient", " MRN 7 ") == f"patient-{expected[:24]}"
    assert pseudonym("study", "MRN 7")[-24:] != expected[:24]
    (home / "other").write_text("cd" * 32)
    monkeypatch.setenv("MWM_SALT_FILE", str(home / "other"))
    assert pseudonym("patient", "MRN 7") != f"patient-{expected[:24]}"


def test_the_salt_is_made_once_for_its_owner_only_and_announced(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pseudonym("dicom", "a")
    path = home / "config" / "mwm" / "salt"
    assert salt_path() == path
    assert path.stat().st_mode & 0o777 == 0o600
    salt = path.read_text()
    assert len(bytes.fromhex(salt)) == 32
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    assert salt not in err
    code = "from shared.pseudonyms import pseudonym; print(pseudonym('dicom', 'a'))"
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (again.stdout.strip(), again.stderr) == (first, "")
    assert path.read_text() == salt


def test_a_salt_that_cannot_be_used_is_an_error_that_does_not_show_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MWM_SALT_FILE", str(home / "absent"))
    with pytest.raises(InputMissingError, match="MWM_SALT_FILE"):
        pseudonym("dicom", "a")
    assert not (home / "absent").exists()  # a mistyped name makes no new salt
    monkeypatch.setattr("shared.pseudonyms._WRITER_WAIT_S", 0.0)
    for number, text in enumerate(("", "zz" * 32, "ab" * 8)):
        path = home / f"salt{number}"
        path.write_text(text)
        monkeypatch.setenv("MWM_SALT_FILE", str(path))
        with pytest.raises(UsageError, match="64 hexadecimal digits") as caught:
            pseudonym("dicom", "a")
        assert not text or text not in str(caught.value)


def test_a_kill_while_the_salt_is_written_leaves_none(home: Path) -> None:
    code = "import os; os.fdopen = lambda *_: os._exit(9); from shared.pseudonyms import *; pseudonym('dicom', 'a')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert not salt_path().exists()
    assert pseudonym("dicom", "a") == pseudonym("dicom", "a")
    assert len(bytes.fromhex(salt_path().read_text())) == 32


def test_what_writes_nothing_makes_no_salt_but_uses_one_that_is_there(home: Path) -> None:
    with unsalted():
        passing = pseudonym("dicom", "a")
        with unsalted():
            assert pseudonym("dicom", "a") == passing
        assert pseudonym("dicom", "b")[6:] != passing[6:]
    assert list(home.iterdir()) == []
    kept = pseudonym("dicom", "a")
    assert kept != passing
    with unsalted():
        assert pseudonym("dicom", "a") == kept


def test_two_processes_that_need_it_first_agree(home: Path) -> None:
    code = "from shared.pseudonyms import pseudonym; print(pseudonym('dicom', 'a'))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = [process.communicate() for process in started]
    assert len({out for out, _ in answers}) == 1
    assert sum("made" in err for _, err in answers) == 1
    assert os.listdir(home / "config" / "mwm") == ["salt"]
    salt = salt_path().read_bytes()
    _make(salt_path())  # who comes second leaves the first one's alone
    assert salt_path().read_bytes() == salt
