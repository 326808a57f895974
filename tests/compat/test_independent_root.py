"""A second implementation, which shares nothing with ours, agrees on a sound store and finds a damaged one."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.artifact import read_card
from tests.compat import independent_root
from tests.stage1_localize.planted_corpus import recipe, write_images


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stage1_localize.job import localize

    folder = tmp_path_factory.mktemp("independent")
    write_images(folder / "images", 20)
    (folder / "images" / "007.png").write_bytes(b"no image")
    localize(recipe(max_failures=1), images=folder / "images", out=folder / "store")
    return folder / "store"


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "store"))


def test_it_shares_no_code_with_what_it_checks() -> None:
    tree = ast.parse(Path(independent_root.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"hashlib", "json", "pathlib", "sys", "numpy", "rfc8785", "tensorstore"}


def test_ids_samples_and_roots_are_ours(published: Path) -> None:
    process = subprocess.run(
        [sys.executable, independent_root.__file__, str(published)], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    found = json.loads(process.stdout)
    card = read_card(published)
    assert found.pop("artifact_id") == card.artifact_id
    assert found.pop("corpus_id") == read_card(published / "corpus").artifact_id
    assert found == {key: card.identity.outputs[key] for key in found}
    assert (found["samples"], found["ok"]) == (20, 19)


def flip_shard(store: Path) -> None:
    path = store / "regions.zarr/maps/c.2.0.0.0"
    raw = bytearray(path.read_bytes())
    raw[10] ^= 8
    path.write_bytes(raw)


def exchange_shards(store: Path) -> None:
    one, other = (store / f"regions.zarr/maps/c.{shard}.0.0.0" for shard in (2, 5))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def lose_shard(store: Path) -> None:
    (store / "regions.zarr/maps/c.9.0.0.0").unlink()


def flip_quarter(store: Path) -> None:
    path = store / "regions.zarr/maps_quarter/c.2.0.0.0"
    raw = bytearray(path.read_bytes())
    raw[10] ^= 8
    path.write_bytes(raw)


def flip_boxes(store: Path) -> None:
    path = store / "regions.zarr/boxes/c.0.0"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 8
    path.write_bytes(raw)


def edit_line(store: Path) -> None:
    path = store / "samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b"003.png", b"0o3.png"))


def edit_card(store: Path) -> None:
    path = store / "artifact.json"
    path.write_bytes(path.read_bytes().replace(b'"ok":19', b'"ok":20'))


def add_file(store: Path) -> None:
    (store / "extra").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_shard, "row 4 (004.png)"),
        (exchange_shards, "row 4 (004.png): maps"),
        (lose_shard, "row 18 (018.png): maps"),
        (flip_quarter, "row 4 (004.png)"),
        (flip_boxes, "detections"),
        (edit_line, "samples_sha256"),
        (edit_card, "artifact.json: card_sha256"),
        (add_file, "extra: not the file that the card lists"),
    ],
)
def test_damage_is_found(damage: Callable[[Path], None], said: str, store: Path) -> None:
    damage(store)
    _, wrong = independent_root.read_store(store)
    assert [line for line in wrong if said in line], wrong


def test_its_tree_is_that_of_the_rfc() -> None:
    entries = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
    assert (
        independent_root.tree_hash(entries).hex() == "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"
    )
    assert np.array_equal(independent_root.quarter(np.full((1, 4, 8), 7, np.uint8)), [[[7, 7]]])
