"""The section of the card: complete, float-free, and read back as the same masks."""

from typing import Any

import pytest
import rfc8785

from shared.errors import ConfigError, IncompatibleError
from shared.order import schedule
from stage2_pretrain.masking.schedule import ScheduleOptions
from stage2_pretrain.masking.spec import MaskSpec, mask_section, mask_spec, mask_spec_of_card
from stage2_pretrain.window import WindowOptions

NAMES = [f"{number}.png" for number in range(10)]


def build(**changes: Any) -> MaskSpec:
    settings: dict[str, Any] = {
        "policy": "region",
        "options": {"overall": 500},
        "seed": 1,
        "grid": (7, 7),
        "samples": 10,
        "batch": 4,
        "steps": 8,
        **changes,
    }
    return mask_spec(**settings)


@pytest.mark.parametrize("seed", [0, 2**53, 2**64 - 1])
def test_a_card_gives_back_what_was_put_on_it(seed: int) -> None:
    spec = build(seed=seed, window=WindowOptions(crop_scale=(500, 900), turns=True))
    section = mask_section(spec)
    rfc8785.dumps(section)
    assert mask_spec_of_card({"mask": section, "other": 1}) == spec
    assert section["policy"]["options"]["hide_inside"] == 800
    assert section["bits_version"] == section["window_version"] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits_version": 2}, "bits_version 2"),
        ({"window_version": 0}, "window_version 0"),
        ({"seed": None}, "mask.seed"),
        ({"surprise": 1}, "mask.surprise"),
    ],
)
def test_a_card_that_cannot_be_drawn_again_is_incompatible(change: dict[str, Any], match: str) -> None:
    with pytest.raises(IncompatibleError, match=match):
        mask_spec_of_card({"mask": {**mask_section(build()), **change}})
    with pytest.raises(IncompatibleError):
        mask_spec_of_card({})


def test_a_policy_of_another_version_is_incompatible() -> None:
    section = mask_section(build())
    section["policy"]["version"] = 7
    with pytest.raises(IncompatibleError, match="policy region: version 7"):
        mask_spec_of_card({"mask": section}).sampler(("lung",))


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'overall'"):
        build(options={"overal": 500})


@pytest.mark.parametrize(
    ("first", "match"),
    [({"overal": 5}, "Did you mean 'overall'"), ({"overall": 0}, "overall"), ({"hide_outside": 5}, "no whole number")],
)
def test_schedules_are_checked_at_once(first: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(schedule=ScheduleOptions(first=first))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 11])
def test_who_takes_part_is_whom_the_schedule_names(steps: int) -> None:
    spec = build(steps=steps)
    seen: dict[int, set[int]] = {}
    for (epoch, indices), _ in zip(schedule(NAMES, spec.batch, spec.seed), range(steps), strict=False):
        seen.setdefault(epoch, set()).update(indices)
    assert list(spec.taking_part(NAMES)) == [seen[epoch] for epoch in range(len(seen))]
    assert spec.epochs == len(seen)
