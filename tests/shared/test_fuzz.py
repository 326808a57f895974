"""Ten thousand damaged files of every format: each is decoded or refused with a reason, in bounded time and memory."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.shared.damaged_files import DICOM_FILES, HANG_S

ROOT = Path(__file__).parents[2]
FILES = 10_000
REASONS = {"decode_failed", "unsupported", "too_large", "nonfinite", "passed over"}
PEAK_BYTES = 1 << 30


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_decoded_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.shared.damaged_files", str(tmp_path), "0", str(FILES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{said[-1]}: crashed, or hung {HANG_S} s\n{done.stderr[-3000:]}"
    *pairs, last = said
    assert [seed for seed, _ in pairs[::2]] == list(range(FILES))
    results = Counter(pairs[1::2])
    print(dict(results), last)
    assert set(results) <= {"decoded"} | REASONS
    assert last["peak_bytes"] < PEAK_BYTES
    # The damage is neither so great that nothing is decoded, nor so small that nothing is refused; of PNG all is.
    of_format = Counter((name, result == "decoded") for (_, name), result in zip(pairs[::2], pairs[1::2], strict=True))
    names = {name for _, name in pairs[::2]}
    assert {f"dicom {name}" for name in DICOM_FILES} < names
    for name in names:
        assert of_format[name, False] > 20, name
        assert of_format[name, True] > 0 or name == "dicom report" or name.startswith("png"), name
