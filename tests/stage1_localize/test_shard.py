"""A shard survives being cut off anywhere, and finds the image that its worker dies of."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.corpus import list_corpus
from shared.images import find_sources
from shared.region_journal import ShardJournal
from shared.region_writer import create_store
from stage1_localize.parts import build_parts
from stage1_localize.shard import STOP, ShardTask, excuse, read_state, run_shard
from tests.stage1_localize.planted_corpus import recipe, write_image, write_images


class Killed(BaseException):
    """Stands for the end of a process: nothing on the way catches it."""


def make_task(tmp_path: Path, rows: int = 10, **fields: Any) -> ShardTask:
    """One shard of ``rows`` rows: 8 shards' worth of images, of which the first is worked on."""
    config = recipe(**fields)
    sources = find_sources(write_images(tmp_path / "images", rows * 8))
    corpus = list_corpus(sources)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    layout = create_store(
        out, sample_ids=[row.sample_id for row in corpus], regions=list(config.regions), grid=(256, 256)
    )
    assert layout.rows_per_shard == rows
    return ShardTask(
        folder=str(out),
        shard=0,
        token="t",
        sources=tuple(sources[:rows]),
        digests=tuple(row.source_sha256 for row in corpus[:rows]),
        regions=config.asked(),
        grounder=config.grounder,
        segmenter=config.segmenter,
        parts_digest=build_parts(config.grounder, config.segmenter, config.asked()).digest,
        grid_px=256,
        micro_batch=config.micro_batch,
    )


def attempt(task: ShardTask, deadly: set[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any] | None:
    """One worker's attempt; None if it died of one of the rows."""
    from stage1_localize.grounders.planted import Planted

    def locate(self: Any, batch: Any, regions: Any) -> Any:
        if {f"{row:03d}.png" for row in deadly} & set(batch.sample_ids):
            raise Killed
        return plain(self, batch, regions)

    plain = Planted.locate
    with monkeypatch.context() as patch:
        patch.setattr(Planted, "locate", locate)
        try:
            return run_shard(task)
        except Killed:
            return None


def quarantined(task: ShardTask) -> dict[int, str]:
    from shared.region_journal import read_done
    from shared.region_writer import open_layout

    path = Path(task.folder) / "journal" / "shard-00000.done"
    entries = read_done(path, open_layout(Path(task.folder)), 0)
    return {entry.line.row: entry.quarantine["reason"] for entry in entries if entry.quarantine}


def test_a_task_is_done_once_and_then_for_good(tmp_path: Path) -> None:
    task = pickle.loads(pickle.dumps(make_task(tmp_path)))
    done = run_shard(task)
    assert {key: done[key] for key in ("shard", "status", "rows", "quarantined")} == {
        "shard": 0,
        "status": "done",
        "rows": 10,
        "quarantined": 0,
    }
    assert run_shard(task) == done


@pytest.mark.parametrize(
    ("micro_batch", "deadly"), [(1, {5, 6}), (4, {5, 6}), (16, {5, 6}), (4, {0, 9}), (4, {4, 5, 6, 7})]
)
def test_the_deadly_image_is_found_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, deadly: set[int]
) -> None:
    task = make_task(tmp_path, micro_batch=micro_batch)
    attempts = 1
    while (done := attempt(task, deadly, monkeypatch)) is None:
        attempts += 1
        assert attempts < 16
    assert quarantined(task) == dict.fromkeys(sorted(deadly), "worker_killed")
    assert done["quarantined"] == len(deadly)
    batches = 2 if deadly == {0, 9} else 1  # of one process: alone, the next micro-batch's rows may follow at once
    assert attempts == batches + 3 * len(deadly) + 1
    healthy = make_task(tmp_path / "healthy", micro_batch=micro_batch)
    run_shard(healthy)
    shards = [Path(each.folder) / "regions.zarr" / "maps" / "c.0.0.0.0" for each in (task, healthy)]
    from shared.region_arrays import ShardedArray

    maps = [ShardedArray(path.parent) for path in shards]
    rows = [row for row in range(10) if row not in deadly]
    outs = [np.empty((len(rows), 2, 256, 256), np.uint8) for _ in maps]
    for array, out in zip(maps, outs, strict=True):
        assert not array.read(rows, out)
    np.testing.assert_array_equal(*outs)


def test_a_death_is_remembered_by_the_next_run_and_one_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path)
    for run in ("t", "u", "v"):
        assert attempt(replace(task, token=run), {5}, monkeypatch) is None
    state = read_state(Path(task.folder), 0)
    assert (state.trying, state.alone, state.cleared, state.died) == ([5], True, [4], {"5": 1})
    assert run_shard(replace(task, token="w"))["quarantined"] == 0


def test_dying_before_an_image_is_tried_is_no_death_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_localize import shard

    task = make_task(tmp_path)
    for _ in range(2):
        assert attempt(task, {5}, monkeypatch) is None
    for _ in range(9):
        with monkeypatch.context() as patch:
            patch.setattr(shard._Work, "_parts", lambda self: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                run_shard(task)
    assert read_state(Path(task.folder), 0).died == {"5": 4}
    assert run_shard(task)["quarantined"] == 0


def test_a_run_killed_again_and_again_costs_no_image_until_it_can_be_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path)
    runs = [replace(task, token=f"run {number}") for number in range(14)]
    assert all(attempt(run, {5}, monkeypatch) is None for run in runs[:9])
    rest = make_task(tmp_path / "rest")
    assert all(attempt(replace(rest, token=run.token), {5}, monkeypatch) is None for run in runs[:9])
    assert run_shard(replace(rest, token="let live"))["quarantined"] == 0
    assert all(attempt(run, {5}, monkeypatch) is None for run in runs[9:13])
    done = attempt(runs[13], {5}, monkeypatch)  # or an image that takes the machine down would be tried for ever
    assert done is not None
    assert quarantined(task) == {5: "worker_killed"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_end_with_a_word_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from stage1_localize import shard

    task = make_task(tmp_path)
    assert attempt(task, {5}, monkeypatch) is None
    assert read_state(Path(task.folder), 0).trying == [4, 5, 6, 7]
    with monkeypatch.context() as patch:
        patch.setattr(shard, "answer", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            run_shard(task)
    assert read_state(Path(task.folder), 0) == shard.ShardState(token="t", done=4)


def test_images_that_only_die_together_are_all_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_localize.grounders.planted import Planted

    task = make_task(tmp_path)
    plain = Planted.locate

    def locate(self: Any, batch: Any, regions: Any) -> Any:
        if {"004.png", "005.png"} <= set(batch.sample_ids):
            raise Killed
        return plain(self, batch, regions)

    monkeypatch.setattr(Planted, "locate", locate)
    for _ in range(4):
        with pytest.raises(Killed):
            run_shard(task)
    assert run_shard(task)["quarantined"] == 4
    assert quarantined(task) == dict.fromkeys(range(4, 8), "worker_killed")


def test_a_half_kept_micro_batch_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path)
    plain, kept = ShardJournal.append_maps, []

    def append(self: Any, row: int, *rest: Any) -> None:
        if row == 6:
            raise Killed
        plain(self, row, *rest)
        kept.append(row)

    with monkeypatch.context() as patch:
        patch.setattr(ShardJournal, "append_maps", append)
        with pytest.raises(Killed):
            run_shard(task)
    assert kept == [0, 1, 2, 3, 4, 5]
    done = run_shard(replace(task, token="next"))
    other = make_task(tmp_path / "other")
    assert run_shard(other)["digest"] == done["digest"]


def test_a_stop_is_obeyed_between_micro_batches(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    (tmp_path / "out" / "run").mkdir()
    seen = []

    def between() -> None:
        seen.append(read_state(tmp_path / "out", 0).done)
        (tmp_path / "out" / STOP).write_text("t")

    assert run_shard(task, between=between) == {"shard": 0, "status": "stopped"}
    assert seen == [4]
    (tmp_path / "out" / STOP).write_text("somebody else's")
    assert run_shard(task)["status"] == "done"


def test_what_cannot_be_read_is_quarantined_by_its_reason(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    write_image(tmp_path / "images" / "003.png", 99)
    (tmp_path / "images" / "007.png").unlink()
    assert run_shard(task)["quarantined"] == 2
    assert quarantined(task) == {3: "source_changed", 7: "missing"}


def test_a_worker_told_to_go_is_no_death_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path)
    for _ in range(6):
        assert attempt(task, {5}, monkeypatch) is None
        excuse(task)
        state = read_state(Path(task.folder), 0)
        assert (state.trying, state.died) == ([], {})
    assert attempt(task, {5}, monkeypatch) is None  # one that is not excused counts as ever
    assert read_state(Path(task.folder), 0).trying == [4, 5, 6, 7]
    assert run_shard(task)["quarantined"] == 0


def test_asked_to_stop_among_rows_tried_alone_it_keeps_what_it_has_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path)
    assert attempt(task, {6}, monkeypatch) is None
    answers = iter([False, False, True])  # before the micro-batch and before row 4; then stop
    assert run_shard(task, stopped=lambda: next(answers, True))["status"] == "stopped"
    state = read_state(Path(task.folder), 0)
    assert (state.trying, state.alone, state.cleared) == ([], True, [4])
    assert run_shard(task)["quarantined"] == 0
