"""The rules of the house that a machine can check: who imports whom, what is light, how long a file is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "stage1_localize", "stage2_pretrain", "stage3_finetune", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
STAGES = tuple(package for package in PACKAGES if package.startswith("stage"))
HEAVY = ("torch", "dask", "distributed", "zarr", "timm", "transformers", "torchvision")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_a_stage_imports_itself_and_shared_only() -> None:
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[0]
        if own == "pipelines":
            continue
        allowed = {own, "shared"}
        for module in imports(path):
            package = module.split(".")[0]
            assert package not in PACKAGES or package in allowed, f"{path}: imports {module}"


def test_inside_shared_contracts_do_not_import_what_stands_on_them() -> None:
    order = [
        "errors canonical",
        "config rng merkle lease registry pseudonyms orientation",
        "artifact region_layout region_shards region_record region_samples",
        "region_arrays workspace decode dicom_values dicom images corpus checkpoint",
        "region_journal region_verify",
        "region_writer regions",
    ]
    level = {name: number for number, names in enumerate(order) for name in names.split()}
    # A store's own methods for notebooks, which import when called; test_regions says that opening one does not.
    late = {("regions", "region_views"), ("regions", "region_dataset")}
    for path in (ROOT / "shared").glob("*.py"):
        for module in imports(path):
            if module.startswith("shared.") and path.stem in level:
                other = module.split(".")[1]
                if (path.stem, other) in late:
                    continue
                assert level.get(other, 99) <= level[path.stem], f"{path.name} imports {module}"


def test_no_drawers_for_odds_and_ends() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "base", "core")]


def test_a_file_has_one_reason_to_exist() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in long.items() if lines > 400}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["localize", "--help"],
        ["pretrain", "--help"],
        ["finetune", "--help"],
        ["fit-grounder", "--help"],
        ["predict", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from pipelines.cli import app\n"
        f"try: app({arguments!r}, standalone_mode=False)\n"
        "except SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_name_in_every_table_loads() -> None:
    from pipelines.answers import WRITERS
    from stage1_localize.grounders import GROUNDERS
    from stage1_localize.segmenters import SEGMENTERS
    from stage2_pretrain.kernels import IMPLS
    from stage2_pretrain.masking import POLICIES
    from stage2_pretrain.methods import METHODS
    from stage3_finetune.tasks import TASKS

    for table in (GROUNDERS, SEGMENTERS, POLICIES, METHODS, IMPLS, TASKS, WRITERS):
        assert len(table) > 0
        for name in table:
            assert callable(table.load(name)), f"{table.what} {name}"


def test_nothing_names_a_machine() -> None:
    needles = ("/" + "work/", "/" + "root/", "/" + "home/")
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), ROOT / "README.md", ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        assert not [needle for needle in needles if needle in text], path
