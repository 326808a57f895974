"""``mwm list``: parts without importing them, artifacts with what became of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import listing
from shared.artifact import CARD
from shared.lease import Lease
from shared.registry import Registry
from tests.pipelines.conftest import Chain
from tests.test_house import HEAVY, ROOT


def plain(out: str) -> list[str]:
    """Lines without their alignment."""
    return [" ".join(line.split()) for line in out.splitlines()]


def test_every_part_is_listed_with_what_it_does(mwm) -> None:
    code, out, _ = mwm("list", "--json")
    assert code == 0
    told = json.loads(out)
    assert tuple(told) == listing.KINDS
    for kind, table in listing.tables().items():
        assert [part["name"] for part in told[kind]] == list(table)
    assert {"default", "tour", "mask-what-matters", "mae"} <= {part["name"] for part in told["recipes"]}
    assert all(len(part["description"]) > 20 for parts in told.values() for part in parts)
    code, out, _ = mwm("list", "policies")
    assert code == 0
    assert "region Hide one share of the region and another of the rest." in plain(out)


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys\n"
        "from pipelines.cli import app\n"
        "app(['list'], standalone_mode=False)\n"
        f"assert not [name for name in (*{HEAVY!r}, 'pydicom', 'nibabel') if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "grounders:" in done.stdout


def test_a_part_of_another_package_is_marked_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mwm
) -> None:
    package = tmp_path / "loud"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "parts.py").write_text('raise RuntimeError\nclass Foo:\n    """Finds foos.\n\n    More."""\n')
    info = tmp_path / "loud_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mwm.grounders]\nfoo = loud.parts:Foo\nlite = loud.parts:Foo\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = mwm("list", "grounders")
    assert code == 0
    assert "foo Finds foos. [loud-parts]" in plain(out)
    assert any(line.startswith("lite ") for line in plain(out))
    assert out.count("loud-parts") == 1  # our own lite is not theirs
    assert listing.describe("nowhere.at:All") == listing.describe("loud.missing:Foo") == ""
    assert Registry("grounder", {}).package("foo") == "loud-parts"


def test_artifacts_of_a_folder(chain: Chain, mwm) -> None:
    (chain.out / "scratch" / CARD).unlink()
    (chain.out / "finetuned" / CARD).write_text("{}")
    (chain.out / "encoder" / CARD).unlink()
    with Lease(chain.out / "encoder"):
        code, out, _ = mwm("list", chain.out, "--json")
    assert code == 0
    told = {item["path"]: item for item in json.loads(out)}
    assert {name: (item["kind"], item["status"]) for name, item in told.items()} == {
        "audit": ("audit-report", "published"),
        "encoder": ("encoder", "locked"),
        "finetuned": ("unknown", "corrupt"),
        "regions": ("region-store", "published"),
        "regions/corpus": ("corpus", "published"),
        "scratch": ("model", "unfinished"),
    }
    sizes = [path.stat().st_size for path in (chain.out / "scratch").rglob("*") if path.is_file()]
    assert told["scratch"]["bytes"] == sum(sizes)
    assert len(told["regions"]["id"]) == 12
    code, out, _ = mwm("list", chain.out / "regions")
    assert [line.split()[0] for line in out.splitlines()] == ["path", ".", "corpus"]
    code, out, err = mwm("list", "polices")
    assert (code, out) == (2, "")
    assert "Did you mean 'policies'?" in err
