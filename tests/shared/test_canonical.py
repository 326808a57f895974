"""The quick encoder writes what the reference implementation of RFC 8785 writes."""

import doctest
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from shared import canonical
from shared.canonical import canonical_json

LEAVES = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text()
ASCII = st.text(st.characters(max_codepoint=127))
BODIES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(ASCII, inner), max_leaves=20)


@given(BODIES)
def test_it_is_the_references(body: Any) -> None:
    assert canonical_json(body) == rfc8785.dumps(body)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        canonical_json("\ud800")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(canonical).failed == 0
