import doctest
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import merkle
from shared.merkle import array_root, merkle_root, row_digest, tensor_digest


def naive_root(entries: list[bytes]) -> bytes:
    """RFC 6962 section 2.1 word for word."""
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1
    while split * 2 < len(entries):
        split *= 2
    return hashlib.sha256(b"\x01" + naive_root(entries[:split]) + naive_root(entries[split:])).digest()


@given(st.lists(st.binary(max_size=40), max_size=70))
def test_root_is_that_of_the_rfc(entries: list[bytes]) -> None:
    assert merkle_root(entries) == naive_root(entries).hex()


def test_root_of_the_published_test_vectors() -> None:
    entries = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243")]
    assert merkle_root(entries[:1]) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert merkle_root(entries[:3]) == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert merkle_root(entries) == "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"


def test_a_row_is_its_values_whatever_their_storage() -> None:
    row = np.arange(12, dtype="<i4").reshape(3, 4)
    assert row_digest(row) == hashlib.sha256(row.tobytes()).digest()
    assert row_digest(row.astype(">i4")) == row_digest(row) == row_digest(np.asfortranarray(row))
    assert row_digest(row[:, ::2]) == row_digest(row[:, ::2].copy())
    assert row_digest(np.zeros((0, 4))) == hashlib.sha256().digest()


def test_an_object_has_no_bytes() -> None:
    with pytest.raises(TypeError, match="object"):
        row_digest(np.array([{}]))


def test_array_root_holds_dtype_and_shape() -> None:
    digests = [row_digest(np.arange(6))] * 4
    roots = {array_root(dtype, shape, digests) for dtype in ("uint8", "int8") for shape in ((4, 6), (4, 2, 3))}
    assert len(roots) == 4
    with pytest.raises(ValueError, match="4 row digests"):
        array_root("uint8", (5, 6), digests)


def test_tensor_digest_tells_name_dtype_shape_and_values_apart() -> None:
    base = {"a": np.zeros(4, np.float32), "b": np.ones((2, 2), np.int64)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].astype(np.int32), "b": base["b"]},
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"a": -base["a"], "b": base["b"]},
        {"a": base["a"]},
        {},
    ]
    assert tensor_digest(dict(reversed(base.items()))) == tensor_digest(base)
    assert len({tensor_digest(tensors) for tensors in [base, *others]}) == 7
    assert tensor_digest({"scalar": 1.5}) == tensor_digest({"scalar": np.float64(1.5)})


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(merkle).failed == 0
