"""Schedules: exact at the ends, monotone, as the formula has it; refused by name where they cannot be meant."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from stage2_pretrain.masking.schedule import ScheduleOptions, options_at, value_at

SHAPES = st.sampled_from(["linear", "cosine"])


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(2, 400), SHAPES)
def test_it_goes_from_the_one_to_the_other(first: int, last: int, epochs: int, shape: str) -> None:
    values = [value_at(first, last, epoch=epoch, epochs=epochs, shape=shape) for epoch in range(epochs)]
    assert (values[0], values[-1]) == (first, last)
    assert values == sorted(values, reverse=first > last)
    for epoch, value in enumerate(values):
        share = epoch / (epochs - 1)
        share = share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        assert abs(value - (first + (last - first) * share)) <= 0.5 + 1e-9


def test_a_single_epoch_is_the_last() -> None:
    assert value_at(1, 9, epoch=0, epochs=1, shape="linear") == 9


def test_other_settings_stay() -> None:
    options: dict[str, Any] = {"hide_inside": 800, "overall": 600, "budget": "matched", "hide_outside": None}
    schedule = ScheduleOptions(first={"hide_inside": 600}, shape="linear")
    assert options_at(schedule, options, epoch=1, epochs=3) == {**options, "hide_inside": 700}
    assert options_at(ScheduleOptions(), options, epoch=1, epochs=3) == options


@pytest.mark.parametrize("name", ["hide_insid", "budget", "hide_outside"])
def test_what_is_no_number_of_the_policy_is_refused(name: str) -> None:
    options = {"hide_inside": 800, "budget": "matched", "hide_outside": None}
    with pytest.raises(ConfigError, match=rf"schedule.first.{name}: no whole number among .*hide_inside"):
        options_at(ScheduleOptions(first={name: 1}), options, epoch=0, epochs=2)
