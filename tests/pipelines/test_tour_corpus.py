from itertools import groupby

from pipelines.tour_corpus import BLOCK, CLASSES, GAP, plan


def test_no_test_slice_is_near_a_training_slice() -> None:
    rows = list(plan(150))
    for a in rows:
        for b in rows:
            if a.split != b.split:
                assert abs(a.index - b.index) > GAP


def test_blocks_alternate_and_are_the_groups() -> None:
    rows = list(plan(150))
    blocks = [(key, list(block)) for key, block in groupby(rows, key=lambda row: row.group)]
    assert len({key for key, _ in blocks}) == len(blocks)
    assert [block[0].split for _, block in blocks] == ["train", "test"] * (len(blocks) // 2) + ["train"] * (
        len(blocks) % 2
    )
    assert all(len(block) == BLOCK for _, block in blocks[:-1])


def test_every_eighth_is_in_both_parts_and_about_a_hundred_slices_stay() -> None:
    for count in range(140, 160):
        rows = list(plan(count))
        assert 90 <= len(rows) <= 112
        for split in ("train", "test"):
            assert len({row.label for row in rows if row.split == split}) == CLASSES
    assert {row.label for row in plan(8 * 24) if row.index < 24} == {"eighth 1"}
