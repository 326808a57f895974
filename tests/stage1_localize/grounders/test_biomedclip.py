"""The grounder around M2IB: what is shared, what is kept apart, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import ConfigError, PromptError
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.biomedclip import BiomedClip
from tests.stage1_localize.grounders import tiny_clip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_clip.build_clip(tmp_path_factory.mktemp("clip") / "model")


def build(given: dict[str, Any], **options: Any) -> BiomedClip:
    return BiomedClip(BiomedClip.Options.model_validate({**given, **options}))


def image(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.kron(rng.random((1, 6, 8)), np.ones((8, 8))).astype(np.float32)


def locate(grounder: BiomedClip, *texts: str, seed: int = 0) -> Detections:
    return grounder.locate(Batch([image(seed)]), [Region("r", texts)])[0]


def test_saliency_is_the_map_itself_and_needs_no_segmenter(given: dict[str, Any]) -> None:
    grounder = build(given, output="saliency")
    assert not grounder.needs_segmenter([Region("r", ("brain",))])
    found = locate(grounder, "brain", "lung")
    one, other = found.probability
    assert one is not None
    assert other is not None
    assert (one.min(), one.max()) == (0, 1)
    assert found.score.tolist() == [1, 1]
    assert not np.array_equal(one, other)
    assert build(given).needs_segmenter([Region("r", ("brain",))])


def test_boxes_are_around_the_largest_parts_above_the_threshold(given: dict[str, Any]) -> None:
    (frame,) = locate(build(given, output="saliency"), "brain").probability
    assert frame is not None
    found = locate(build(given, threshold="fixed", level_milli=600, boxes_max=20, area_min_px=1), "brain")
    inside = np.zeros((256, 256), np.bool_)
    for x0, y0, x1, y1 in (found.box_xyxy_px * 256 / np.array([64, 48, 64, 48])).round().astype(int):
        inside[y0:y1, x0:x1] = True
    above = np.floor(frame * 255 + 0.5) > 153
    assert above.any()
    assert not (above & ~inside).any()
    assert (found.score >= 0.6).all()
    assert len(locate(build(given, threshold="fixed", level_milli=600, area_min_px=60_000), "brain")) == 0


def test_the_lower_layers_run_once_an_image_and_the_upper_ones_a_step_and_wording(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grounder = build(given)
    rows = {"below": 0, "above": 0, "stem": 0}
    clip = grounder._clip
    for block, part in zip(clip.blocks, ("below", "below", "above"), strict=True):
        block.register_forward_hook(lambda _, seen, __, part=part: rows.__setitem__(part, rows[part] + len(seen[0])))
    batch = Batch([image(0), image(1)])
    for _ in range(2):  # the second time everything is remembered
        grounder.locate(batch, [Region("a", ("brain", "lung")), Region("b", ("brain",))])
        assert rows == {"below": 2 * 2, "above": 2 * 2 * (given["steps"] - 1) * given["draws"], "stem": 0}


def test_a_map_is_a_function_of_pixels_words_and_seed(given: dict[str, Any]) -> None:
    def frame(seed: int = 0, pixels: int = 0, text: str = "brain") -> bytes:
        (own,) = locate(build(given, output="saliency", seed=seed), text, seed=pixels).probability
        assert own is not None
        return own.tobytes()

    assert frame() == frame()
    assert len({frame(), frame(seed=1), frame(pixels=1), frame(text="lung")}) == 4


def test_presence_is_the_share_among_competing_wordings(given: dict[str, Any]) -> None:
    texts = ("brain", "lung", "white blood cell")
    shares = [
        locate(build(given, output="saliency", against=[other for other in texts if other != text]), text).score[0]
        for text in texts
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert max(shares) - min(shares) > 0.01
    least = int(min(shares) * 1000) + 1
    kept = [len(locate(build(given, against=texts, presence_min_milli=least), text)) for text in texts]
    assert sorted(kept) == [0, 1, 1]


def test_what_does_not_fit_is_refused_before_any_image(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="layer: 2, but this model's vision tower has 3 blocks"):
        build(given, layer=2)
    with pytest.raises(ConfigError, match="without 'against' every presence is 1"):
        build(given, presence_min_milli=10)
    with pytest.raises(PromptError, match="has 22 tokens, this model reads 16"):
        build(given).check([Region("r", ("brain " * 20,))])
    with pytest.raises(PromptError, match="against: "):
        build(given, against=["lung " * 20]).check([Region("r", ("brain",))])


def test_where_the_weights_lie_is_no_part_of_the_identity(given: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    elsewhere = build({**given, "model": str(shutil.copytree(given["model"], tmp_path / "copy"))})
    assert elsewhere.identity() == build(given).identity()
    assert str(tmp_path) not in str(elsewhere.identity())
