"""Fixtures for every test, and the one rule for what a test needs from outside."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    # pytest runs as many processes as there are cores: threads of one would wait for those of the others.
    os.environ.setdefault(_name, "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two processes, none is to begin a test of minutes when all else is done.

    Whole files, so that what a file's tests share is made once.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _salt(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pseudonyms of this session come from a salt of its own; the user's is neither read nor made."""
    salt = tmp_path_factory.mktemp("salt") / "salt"
    salt.write_text("5a" * 32)
    os.environ["MWM_SALT_FILE"] = str(salt)


def lacking(message: str) -> NoReturn:
    """What a test needs is not there: an error in CI, else a skip."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real images for tests: ``MWM_TEST_DATA``, else ``../shared/data``. Absent is an error in CI, else a skip."""
    folder = Path(os.environ.get("MWM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "manifest.csv").is_file():
        lacking("test data not found: set MWM_TEST_DATA")
    return folder
