"""Every published file of every kind of artifact, damaged in every way: an audit finds each, and names it.

Nothing here knows what files an artifact has: a file that a later release publishes is covered by itself.
"""

import json
import random
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipelines.audit import AuditResult, audit
from shared.artifact import CARD, KIND_VERSIONS, read_card
from shared.config import load
from shared.errors import IncompatibleError
from shared.region_shards import crc32c
from stage1_localize.config import LocalizeConfig
from stage1_localize.job import localize
from tests.pipelines.conftest import RECIPE, ROOT, Chain, write_inputs

PUBLISHED = ("corpus", "region-store", "encoder", "model", "audit-report")
"""Kinds that this release makes."""

FLIPS = 5
Damage = Callable[[Path], None]


def parts(chain: Chain) -> dict[str, Path]:
    """One artifact of each kind in a finished chain."""
    found: dict[str, Path] = {}
    for card in sorted(chain.out.rglob(CARD)):
        found.setdefault(read_card(card.parent).identity.kind, card.parent)
    return found


def files(artifact: Path) -> list[Path]:
    """Everything below an artifact but ``run/``."""
    found = [path for path in sorted(artifact.rglob("*")) if path.is_file()]
    return [path for path in found if path.relative_to(artifact).parts[0] != "run"]


def flip(place: int, bit: int) -> Damage:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[place] ^= 1 << bit
        path.write_bytes(raw)

    return damage


def truncate(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def swap_lines(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(index for index in range(len(lines) - 1) if lines[index] != lines[index + 1])
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    path.write_bytes(b"".join(lines))


def swap_with(other: Path) -> Damage:
    def damage(path: Path) -> None:
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)

    return damage


def swap_chunks(path: Path) -> None:
    """Exchange two rows of a shard and write a right index: every checksum holds, and nothing is out of bounds."""
    raw, rows = path.read_bytes(), rows_per_shard(path)
    cells = struct.unpack(f"<{2 * rows}Q", raw[-16 * rows - 4 : -4])
    chunks = [raw[start : start + length] for start, length in zip(cells[::2], cells[1::2], strict=True)]
    chunks[0], chunks[1] = chunks[1], chunks[0]
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
    index = b"".join(struct.pack("<2Q", starts[place], len(chunk)) for place, chunk in enumerate(chunks))
    path.write_bytes(b"".join(chunks) + index + crc32c(index))


def rows_per_shard(path: Path) -> int:
    return int(json.loads((path.parent / "zarr.json").read_bytes())["chunk_grid"]["configuration"]["chunk_shape"][0])


@dataclass(frozen=True)
class Wound:
    """A damage of one file."""

    name: str
    path: Path
    inflict: Damage
    also: Path | None = None


def wounds(artifact: Path) -> Iterator[Wound]:
    every = files(artifact)
    for path in every:
        size = path.stat().st_size
        relative = path.relative_to(artifact).as_posix()
        rng = random.Random(relative)  # the same places every time, other ones in each file
        yield Wound("deletion", path, Path.unlink)
        yield Wound("addition", path, append)
        if not size:
            continue
        places = [0, size - 1, *(rng.randrange(size) for _ in range(FLIPS - 2))]
        for place in places:
            yield Wound("flip", path, flip(place, rng.randrange(8)))
        yield Wound("truncation", path, truncate)
        if b"\n" in path.read_bytes()[:-1] and path.suffix in (".jsonl", ".json", ".csv", ".yaml", ".html", ".md"):
            yield Wound("lines swapped", path, swap_lines)
    shards = [path for path in every if path.parent.name in ("maps", "maps_quarter") and path.name.startswith("c.")]
    for path, other in pairwise(shards):
        if path.parent == other.parent and path.read_bytes() != other.read_bytes():
            yield Wound("shards swapped", path, swap_with(other), other)
        if rows_per_shard(path) > 1:
            yield Wound("chunks swapped", path, swap_chunks)


def named(result: AuditResult, artifact: Path, path: Path) -> bool:
    """Whether a verdict that did not pass names the file; of flat arrays zarr tells the array only."""
    said = " ".join(row.detail for row in result.rows if row.verdict != "identical")
    relative = path.relative_to(artifact).as_posix()
    return relative in said or (path.parent.parent.name == "regions.zarr" and relative.rpartition("/")[0] in said)


@pytest.fixture(scope="session")
def sound(finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One artifact of each kind; the store is one of two rows a shard and a quarantined image."""
    more = write_inputs(tmp_path_factory.mktemp("more"), count=20)
    (more.images / "p07.png").write_bytes((more.images / "p07.png").read_bytes()[:500])
    localize(load(LocalizeConfig, RECIPE["localize"]), images=more.images, out=more.out)
    found = {**parts(finished), "region-store": more.out}
    for artifact in found.values():
        assert audit(artifact).exit_code == 0, artifact
    return found


def test_the_sweep_covers_every_kind_that_a_chain_publishes(sound: dict[str, Path]) -> None:
    assert set(sound) == set(PUBLISHED)
    # Kinds that no chain makes: the tests of the command that makes one call `sweep` on it.
    assert set(KIND_VERSIONS) - set(PUBLISHED) <= {"study", "head"}


def sweep(artifact: Path) -> Counter[str]:
    """Damage every file of an artifact in every way, one at a time; how often each kind of damage was found."""
    assert audit(artifact).exit_code == 0
    counts: Counter[str] = Counter()
    touched = set()
    for wound in wounds(artifact):
        before = {path: path.read_bytes() for path in (wound.path, wound.also) if path is not None}
        wound.inflict(wound.path)
        what = f"{wound.name} of {wound.path.relative_to(artifact)}"
        assert any(not path.exists() or path.read_bytes() != raw for path, raw in before.items()), what
        if wound.name == "deletion" and wound.path == artifact / CARD:
            with pytest.raises(IncompatibleError, match=f"not published: it has no {CARD}"):
                audit(artifact)
        else:
            result = audit(artifact)
            assert result.exit_code == 4, (what, result.lines())
            assert named(result, artifact, wound.path), (what, result.lines())
        counts[wound.name] += 1
        touched.add(wound.path)
        for path, raw in before.items():
            path.write_bytes(raw)
    assert touched == set(files(artifact))
    assert audit(artifact).exit_code == 0
    filled = sum(path.stat().st_size > 0 for path in touched)
    assert (counts["deletion"], counts["addition"], counts["truncation"]) == (len(touched), len(touched), filled)
    assert counts["flip"] == FLIPS * filled
    print(f"{artifact.name}: {len(touched)} files, {counts.total()} damages: {dict(counts)}")
    return counts


@pytest.mark.parametrize("kind", PUBLISHED)
def test_any_damage_of_any_file_is_found_and_named(kind: str, sound: dict[str, Path], tmp_path: Path) -> None:
    counts = sweep(Path(shutil.copytree(sound[kind], tmp_path / kind)))
    assert counts["lines swapped"] >= 1
    if kind == "region-store":
        assert (counts["shards swapped"], counts["chunks swapped"]) == (18, 19)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_an_unlisted_file_in_any_folder_is_found_and_named(kind: str, sound: dict[str, Path], tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(sound[kind], tmp_path / kind))
    folders = [artifact, *(path for path in sorted(artifact.rglob("*")) if path.is_dir() and path.name != "run")]
    for folder in [*folders, artifact / "new" / "deep", artifact / "regions.zarr" / "new"]:
        if folder.relative_to(artifact).parts[:1] == ("run",):
            continue
        made = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "extra.bin").write_bytes(b"x")
        result = audit(artifact)
        assert result.exit_code == 4, folder
        assert named(result, artifact, folder / "extra.bin"), result.lines()
        (folder / "extra.bin").unlink()
        if not made:
            folder.rmdir()
    (artifact / "run").mkdir(exist_ok=True)
    (artifact / "run" / "extra.bin").write_bytes(b"x")  # logs and state are not the artifact
    assert audit(artifact).exit_code == 0


@pytest.mark.parametrize("kept", [True, False], ids=["with run", "copied without run"])
def test_in_a_chain_a_lost_card_is_missing(kept: bool, chain: Chain) -> None:
    for artifact in parts(chain).values():
        if not kept:
            shutil.rmtree(artifact / "run", ignore_errors=True)
        raw = (artifact / CARD).read_bytes()
        (artifact / CARD).unlink()
        result = audit(chain.out)
        (artifact / CARD).write_bytes(raw)
        if artifact.name == "audit":  # one that is being made has no card either
            continue
        assert result.exit_code == 4, artifact
        wrong = [row for row in result.rows if row.verdict == "missing"]
        told = f"{CARD}" if artifact.name != "corpus" else f"corpus/{CARD}: missing"
        name = artifact.parent if artifact.name == "corpus" else artifact
        assert [row.artifact for row in wrong] == [name.relative_to(chain.out).as_posix()]
        assert told in wrong[0].detail
    assert audit(chain.out).exit_code == 0


@pytest.mark.parametrize(
    ("damage", "code", "told"),
    [
        (None, 0, "identical"),
        (flip(30, 0), 4, "c.0.0.0.0"),
        (truncate, 4, "c.0.0.0.0"),
        (Path.unlink, 4, "c.0.0.0.0: missing"),
    ],
    ids=["sound", "flip", "truncation", "deletion"],
)
def test_the_exit_code_of_the_process(damage: Damage | None, code: int, told: str, chain: Chain) -> None:
    if damage is not None:
        damage(chain.out / "regions" / "regions.zarr" / "maps" / "c.0.0.0.0")
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "audit", str(chain.out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    assert told in process.stdout
    assert "Traceback" not in process.stderr
