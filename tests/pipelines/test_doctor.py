import pytest

from pipelines import doctor


def test_this_installation_is_sound() -> None:
    checks = doctor.examine()
    assert [check for check in checks if not check.ok] == []
    assert {"torch", "lite", "lite_medsam", "zarr", "shared"} <= {check.name for check in checks}


def test_a_broken_part_is_a_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_localize.segmenters import lite_medsam

    lite_medsam.load_model.cache_clear()
    monkeypatch.setattr(lite_medsam, "WEIGHTS_SHA256", "0" * 64)
    try:
        bad = [check for check in doctor.examine() if not check.ok]
    finally:
        lite_medsam.load_model.cache_clear()
    assert [check.name for check in bad] == ["segmenter"]
    assert "CorruptError" in bad[0].found
    assert bad[0].remedy
