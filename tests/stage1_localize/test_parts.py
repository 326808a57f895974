"""Parts are built by name, refused early, and described so that equal digests answer equally."""

import pytest

from shared.errors import ConfigError, IncompatibleError, PromptError
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Region
from stage1_localize.parts import build_parts, parts_of_this_process, resolve
from tests.stage1_localize.planted_corpus import recipe

PLANTED, NONE = PartConfig(name="planted"), PartConfig(name="none")
DISC = (Region("a", ("disc",)),)


def test_what_cannot_work_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="unknown grounder 'plantet'"):
        build_parts(PartConfig(name="plantet"), NONE, DISC)
    with pytest.raises(ConfigError, match="unknown key"):
        build_parts(PartConfig(name="planted", options={"score": 1}), NONE, DISC)
    with pytest.raises(PromptError):
        build_parts(PLANTED, NONE, (Region("a", ("heart",)),))
    with pytest.raises(ConfigError, match="boxes without pixels"):
        build_parts(PLANTED, NONE, (Region("a", ("box",)),))


def test_the_digest_follows_what_decides_answers() -> None:
    base = build_parts(PLANTED, NONE, DISC).digest
    slow = PartConfig(name="planted", options={"delay_ms": 3})
    weak = PartConfig(name="planted", options={"score_milli": 3})
    assert build_parts(slow, NONE, DISC).digest == base
    assert build_parts(weak, NONE, DISC).digest != base


def test_a_worker_keeps_its_parts_and_refuses_others() -> None:
    expected = build_parts(PLANTED, NONE, DISC).digest
    first = parts_of_this_process(PLANTED, NONE, DISC, expected)
    assert parts_of_this_process(PLANTED, NONE, DISC, expected) is first
    with pytest.raises(IncompatibleError, match="differ here"):
        parts_of_this_process(PLANTED, NONE, DISC, "0" * 64)


def test_every_option_is_spelled_out() -> None:
    assert resolve(recipe()).grounder.options == {
        "score_milli": 1000,
        "level_milli": 800,
        "delay_ms": 0,
        "deadly_width_px": None,
    }
