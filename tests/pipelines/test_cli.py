"""The command line as a user meets it: what it prints where, its exit codes, and that nothing is lost."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rfc8785
import yaml
from safetensors.numpy import load_file, save_file

from shared.artifact import file_sha256, read_card
from shared.lease import Lease
from tests.pipelines.conftest import Chain, write_inputs

ROOT = Path(__file__).parents[2]


def localize(chain: Chain, out: Path, *more: str) -> list[str]:
    return ["localize", str(chain.recipe), "--images", str(chain.images), "--out", str(out), *more]


def flip(path: Path, place: int = -9) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def test_a_chain_ends_with_five_lines_and_again_with_the_same_ids(chain: Chain, mwm) -> None:
    before = {path: read_card(path.parent).artifact_id for path in chain.out.rglob("artifact.json")}
    code, out, _ = mwm(*chain.command())
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["made", "where", "digests", "skipped", "next"]
    assert before == {path: read_card(path.parent).artifact_id for path in chain.out.rglob("artifact.json")}
    report = (chain.out / "report.html").read_text()
    assert "Not for diagnosis" in report
    assert str(chain.root) not in report


def test_data_goes_to_stdout_and_talk_to_stderr(chain: Chain, mwm, tmp_path: Path) -> None:
    code, out, err = mwm(*localize(chain, tmp_path / "r", "--json"))
    assert code == 0
    made = json.loads(out)
    assert made["artifact_id"] == read_card(tmp_path / "r").artifact_id
    assert err
    code, out, err = mwm(*localize(chain, tmp_path / "quiet", "-q"))
    assert (code, err) == (0, "")
    code, out, _ = mwm(*localize(chain, tmp_path / "r"))
    assert code == 0
    assert out.startswith("already done")


@pytest.mark.parametrize(
    ("more", "code", "kind", "told"),
    [
        (["--set", "grid_pix=64"], 2, "config", "grid_pix: unknown key. Did you mean 'grid_px'?"),
        (["--set", "regions.bright="], 2, "", "regions"),
        (["--set", "regions.bright=''"], 2, "", "regions"),
        (["--set", "regions.bright=elephant"], 2, "prompt", "'elephant'"),
        (["--set", "grounder.name=plantd"], 2, "config", "unknown grounder 'plantd'"),
        (["--images", "nowhere"], 2, "", "nowhere"),
        (["--set", "nonsense"], 2, "config", "expected path.to.key=value"),
        (["--level", "3"], 2, "usage", "No such option"),
    ],
)
def test_bad_input_is_one_clear_line(finished: Chain, mwm, tmp_path: Path, more, code, kind, told) -> None:
    found, out, err = mwm(*localize(finished, tmp_path / "x", *more))
    assert found == code
    line = next(line for line in err.splitlines() if line.startswith("error["))
    assert line.startswith(f"error[{kind}" if kind else "error[")
    assert told in err
    assert out == ""
    assert not (tmp_path / "x" / "artifact.json").exists()


def test_a_recipe_that_is_not_there_names_those_that_are(mwm) -> None:
    code, _, err = mwm("run", "toor")
    assert code == 2
    assert "tour" in err


def test_an_unreadable_image_is_quarantined_and_counted(chain: Chain, mwm, tmp_path: Path) -> None:
    raw = (chain.images / "p03.png").read_bytes()
    (chain.images / "p03.png").write_bytes(raw[: len(raw) // 2])
    code, out, _ = mwm(*localize(chain, tmp_path / "r"))
    assert code == 0
    assert "skipped: 1 inputs quarantined" in out
    assert "decode_failed" in (tmp_path / "r" / "quarantine.jsonl").read_text()
    code, _, err = mwm(*localize(chain, tmp_path / "strict", "--set", "max_failures=0"))
    assert code == 6
    assert "error[too-many-quarantined]" in err


def test_a_prompt_that_finds_nothing_is_a_warning(chain: Chain, mwm, tmp_path: Path) -> None:
    code, _, err = mwm(*localize(chain, tmp_path / "r", "--set", "regions.absent=nothing"))
    assert code == 0
    assert "warning" in err
    assert "absent" in err


def test_a_flipped_bit_anywhere_is_found_by_audit(chain: Chain, mwm) -> None:
    code, out, _ = mwm("audit", chain.out, "--level", "masks")
    assert code == 0
    assert "masks" in out
    shards = [path for path in (chain.out / "regions" / "regions.zarr" / "maps").iterdir() if path.name != "zarr.json"]
    broken = [
        *shards,
        chain.out / "encoder" / "witnesses.safetensors",
        chain.out / "encoder" / "encoder" / "model.safetensors",
        chain.out / "encoder" / "report.html",
        chain.out / "scratch" / "predictions.csv",
        chain.out / "regions" / "samples.jsonl",
        chain.out / "regions" / "artifact.json",
        chain.out / "regions" / "corpus" / "samples.jsonl",
    ]
    for path in broken:
        flip(path)
        code, out, _ = mwm("audit", chain.out)
        assert code == 4, path
        assert "corrupt" in out
        flip(path)
    assert mwm("audit", chain.out)[0] == 0


def test_a_corrupted_shard_stops_pretraining(chain: Chain, mwm, tmp_path: Path) -> None:
    for path in (chain.out / "regions" / "regions.zarr" / "maps").iterdir():
        if path.name != "zarr.json":
            flip(path, 40)
    code, _, err = mwm(
        "pretrain", chain.recipe, "--images", chain.images, "--regions", chain.out / "regions", "--out", tmp_path / "e"
    )
    assert code == 4
    assert "error[corrupt]" in err


def forge(artifact: Path, *files: str) -> None:
    """Rewrite a card so that changed files pass every digest that stands on it, but for the id."""
    body = json.loads((artifact / "artifact.json").read_bytes())
    for name in files:
        body["provenance"]["files"][name] = file_sha256(artifact / name)
    del body["card_sha256"]
    body["card_sha256"] = hashlib.sha256(rfc8785.dumps(body)).hexdigest()
    (artifact / "artifact.json").write_bytes(rfc8785.dumps(body))


def test_weights_forged_with_their_card_are_found_and_refused(chain: Chain, mwm, tmp_path: Path) -> None:
    encoder, name = chain.out / "encoder", "encoder/model.safetensors"
    tensors = {key: value.copy() for key, value in load_file(encoder / name).items()}
    tensors["conv1.weight"] += 1
    save_file(tensors, encoder / name)
    forge(encoder, name)
    code, out, _ = mwm("audit", encoder)
    assert code == 4
    assert "other weights" in out
    code, _, err = mwm(
        "finetune", chain.recipe, "--images", chain.images, "--labels", chain.labels, "--encoder", encoder, "--out",
        tmp_path / "m",
    )  # fmt: skip
    assert code == 4
    assert "other weights" in err


def test_predictions_forged_with_their_card_are_found(chain: Chain, mwm) -> None:
    path = chain.out / "scratch" / "predictions.csv"
    header, first, *rest = path.read_text().splitlines()
    cells = first.split(",")
    cells[-2:] = ["1", "0"]
    path.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    forge(chain.out / "scratch", "predictions.csv")
    code, out, _ = mwm("audit", chain.out)
    assert code == 4
    assert "other predictions" in out


def test_a_witness_forged_with_its_card_is_found(chain: Chain, mwm) -> None:
    """Whoever rewrites witness and card alike passes every file's digest; the id and redrawing tell."""
    encoder = chain.out / "encoder"
    tensors = load_file(encoder / "witnesses.safetensors")
    tensors["bits"] = tensors["bits"].copy()
    tensors["bits"].reshape(-1)[0] ^= np.uint8(1)
    save_file(tensors, encoder / "witnesses.safetensors")
    forge(encoder, "witnesses.safetensors")
    code, out, _ = mwm("audit", encoder, "--level", "masks", "--regions", chain.out / "regions")
    assert code == 4
    assert "other witnesses" in out
    assert "drift" in out


@pytest.mark.parametrize("raw", [None, b"{}", b"[1"])
def test_a_card_that_is_gone_or_blank_does_not_make_an_audit_pass(chain: Chain, mwm, raw: bytes | None) -> None:
    card = chain.out / "encoder" / "artifact.json"
    if raw is None:
        card.unlink()
    else:
        card.write_bytes(raw)
    assert mwm("audit", chain.out)[0] == 4
    (chain.out / "regions" / "artifact.json").unlink()
    assert mwm("audit", chain.out / "regions")[0] == 5


def test_a_published_audit_never_stands_for_a_later_one(chain: Chain, mwm, tmp_path: Path) -> None:
    assert mwm("audit", chain.out, "--out", tmp_path / "a")[0] == 0
    assert mwm("audit", chain.out, "--out", tmp_path / "a")[0] == 0
    with (chain.out / "encoder" / "report.html").open("a") as file:
        file.write("x")
    code, _, err = mwm("audit", chain.out, "--out", tmp_path / "a")
    assert code == 2
    assert "other-run" in err


def test_a_chain_can_grow(tmp_path: Path, mwm) -> None:
    chain = write_inputs(tmp_path)
    recipe = yaml.safe_load(chain.recipe.read_text())
    later = {key: recipe.pop(key) for key in ("pretrain", "finetune")}
    chain.recipe.write_text(yaml.safe_dump(recipe))
    assert mwm(*chain.command())[0] == 0
    chain.recipe.write_text(yaml.safe_dump({**recipe, "pretrain": later["pretrain"]}))
    assert mwm(*chain.command())[0] == 0
    assert read_card(chain.out / "audit").identity.outputs["exit_code"] == 0


def test_fresh_moves_runs_only_and_never_a_live_one(chain: Chain, mwm) -> None:
    code, _, err = mwm(*localize(chain, chain.images, "--fresh"))
    assert code == 2
    assert chain.images.is_dir()
    with Lease(chain.out / "encoder"):
        code, _, err = mwm(*chain.command("--fresh"))
    assert code == 2
    assert "is writing here" in err
    with Lease(chain.out):
        assert mwm(*chain.command())[0] == 7


def test_paths_that_cannot_be_used_are_the_users_to_mend(finished: Chain, mwm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = finished.out / "encoder" / "more"
    for command in (
        localize(finished, tmp_path / "file"),
        localize(finished, tmp_path / "file" / "below"),
        localize(finished, inside),
        ["run", finished.recipe, "--out", tmp_path / "x", "--images", finished.images],
        ["inspect", finished.out / "regions", "--sample", "p00.png", "--images", finished.images, "--out",
         tmp_path / "none" / "p.png"],
        ["finetune", finished.recipe, "--images", finished.images, "--labels", finished.labels, "--out",
         tmp_path / "g", "--set", "device=cuda"],
    ):  # fmt: skip
        code, _, err = mwm(*command)
        assert (code, "error[bug]" in err) == (2, False), command
    assert not inside.exists() or not any(inside.iterdir())


def test_a_card_repeats_no_path_or_name_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.options import command_told

    words = [
        "mwm",
        "localize",
        "tour",
        "--images",
        "john smith",
        "--out=jane",
        "--set",
        f"regions.a=[{'b,' * 200}]",
        "-q",
    ]
    monkeypatch.setattr(sys, "argv", words)
    told = command_told()
    assert told.startswith("mwm localize tour --images <images> --out <out> --set regions.a=")
    assert "john" not in told
    assert "jane" not in told
    monkeypatch.setattr(sys, "argv", ["mwm", "localize", "--set", "grounder.options.head=/srv/jane/heads/h@sha256:ab"])
    assert command_told() == "mwm localize --set grounder.options.head=<path>"
    for value in ("/data/Jane Doe/x", "[a, /srv/Jane Doe/x]", "jane/h", "~/jane", "C:\\Jane Doe"):
        for given in (["--set", f"head={value}"], [f"--set=head={value}"]):
            monkeypatch.setattr(sys, "argv", ["mwm", "localize", *given, "--set", "seed=3"])
            assert command_told() == "mwm localize --set head=<path> --set seed=3"
    monkeypatch.setattr(sys, "argv", ["mwm", "audit", "patient7", "--level", "masks"])
    assert command_told() == "mwm audit <path> --level masks"


def test_an_unpublished_input_is_incompatible_and_a_live_one_locked(chain: Chain, mwm, tmp_path: Path) -> None:
    card = chain.out / "regions" / "artifact.json"
    card.unlink()
    command = ["pretrain", chain.recipe, "--images", chain.images, "--regions", chain.out / "regions", "--out",
               tmp_path / "e"]  # fmt: skip
    assert mwm(*command)[0] == 5
    with Lease(chain.out / "regions"):
        code, _, err = mwm(*command)
    assert code == 7
    assert "error[locked]" in err


def test_a_folder_under_another_writers_lease(finished: Chain, mwm, tmp_path: Path) -> None:
    with Lease(tmp_path / "r"):
        code, _, err = mwm(*localize(finished, tmp_path / "r"))
    assert code == 7
    assert str(os.getpid()) in err


def test_other_settings_in_the_same_folder_are_refused_and_fresh_keeps_the_old(chain: Chain, mwm) -> None:
    regions = chain.out / "regions"
    old = read_card(regions).artifact_id
    code, _, err = mwm(*localize(chain, regions, "--set", "grid_px=32"))
    assert code == 2
    assert "grid" in err
    assert read_card(regions).artifact_id == old
    assert mwm(*localize(chain, regions, "--set", "grid_px=32", "--fresh"))[0] == 0
    assert read_card(regions.with_name("regions.old-1")).artifact_id == old


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_exits_75_and_the_same_command_continues(tmp_path: Path, mwm) -> None:
    chain = write_inputs(tmp_path / "in")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        code, _, err = mwm(*localize(chain, small / "r"))
        assert code == 75
        assert "error[disk-full]" in err
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert mwm(*localize(chain, small / "r"))[0] == 0
        whole = read_card(small / "r").artifact_id
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert mwm(*localize(chain, tmp_path / "r"))[0] == 0
    assert read_card(tmp_path / "r").artifact_id == whole
