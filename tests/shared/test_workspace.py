import os
from pathlib import Path

import pytest

from shared.artifact import publish, verify
from shared.errors import SpecMismatchError, UsageError
from shared.lease import Lease
from shared.workspace import begin, set_aside


def start(out: Path, spec: dict) -> str:
    with Lease(out):
        return begin(out, kind="encoder", inputs=[], spec=spec, resolved="a: 1\n")[0]


def test_new_then_continue_then_done(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(out, {"lr": "0.1", "n": {"a": 1}}) == "new"
    assert (out / "resolved.yaml").read_text() == "a: 1\n"
    assert start(out, {"lr": "0.1", "n": {"a": 1}}) == "continue"
    publish(out, kind="encoder", inputs=[], spec={"lr": "0.1", "n": {"a": 1}}, outputs={})
    assert start(out, {"lr": "0.1", "n": {"a": 1}}) == "done"


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("act", range(2))
def test_a_kill_in_the_beginning_leaves_a_run_that_begins_again(
    act: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, []

    def replace_or_die(*paths: Path) -> None:
        if after:
            replace(*paths)
        seen.append(paths)
        if len(seen) == act + 1:
            raise Killed
        if not after:
            replace(*paths)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("shared.artifact.os.replace", replace_or_die)
        with pytest.raises(Killed):
            start(out, {"lr": "0.1"})
    assert start(out, {"lr": "0.1"}) == ("continue" if (act, after) != (0, False) else "new")
    card = publish(out, kind="encoder", inputs=[], spec={"lr": "0.1"}, outputs={})
    assert (out / "resolved.yaml").read_text() == "a: 1\n"
    assert verify(out, card) == []


@pytest.mark.parametrize("published", [False, True])
def test_another_specification_is_refused_and_the_keys_are_named(tmp_path: Path, published: bool) -> None:
    out = tmp_path / "run"
    start(out, {"lr": "0.1", "n": {"a": 1}})
    if published:
        publish(out, kind="encoder", inputs=[], spec={"lr": "0.1", "n": {"a": 1}}, outputs={})
    with pytest.raises(SpecMismatchError, match=r"spec\.n\.a \(1 there, 2 asked\)") as caught:
        start(out, {"lr": "0.1", "n": {"a": 2}})
    assert "lr" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        start(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_fresh_keeps_the_old_run_aside(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert set_aside(out) is None
    for number in (1, 2):
        start(out, {"seed": number})
        assert set_aside(out) == tmp_path / f"run.old-{number}"
        assert not out.exists()
    with Lease(out), pytest.raises(UsageError):
        set_aside(out)
