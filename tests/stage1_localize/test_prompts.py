"""Prompts are normalised once; nothing unclear gets through."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PromptError
from stage1_localize.contracts import Region
from stage1_localize.prompts import NAME_LENGTH_MAX, TEXT_LENGTH_MAX, normalise, parse_regions


def test_names_and_wordings_keep_their_order() -> None:
    regions = parse_regions({"tumour": ["brain  tumour", " neoplasm"], "brain": "brain"})
    assert regions == (Region("tumour", ("brain tumour", "neoplasm")), Region("brain", ("brain",)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "empty"),
        ({" ": "x"}, "empty"),
        ({"a": ""}, "empty"),
        ({"a": []}, "no wording"),
        ({"a": ["x", "x "]}, "given twice"),
        ({"A": "x", "a": "y"}, "differ only in case"),
        ({"a": "e\u0301", "b": ["\u00e9", "e\u0301"]}, "given twice"),
        ({"a": "x\x00"}, "control"),
        ({"a": "x\u202e"}, "control"),
        ({"a": ["lung", "."]}, "region 'a': text '.' holds no letter or digit"),
        ({"a": "x" * (TEXT_LENGTH_MAX + 1)}, "at most"),
        ({"a" * (NAME_LENGTH_MAX + 1): "x"}, "at most"),
    ],
)
def test_prompts_that_are_refused(asked: dict[str, str | list[str]], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        parse_regions(asked)


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing(text: str) -> None:
    try:
        once = normalise(text, "text", TEXT_LENGTH_MAX)
    except PromptError:
        return
    assert normalise(once, "text", TEXT_LENGTH_MAX) == once
    assert normalise(unicodedata.normalize("NFD", text), "text", TEXT_LENGTH_MAX) == once
