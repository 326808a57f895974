"""The recipe of stage 1: what it accepts, what enters the identity."""

import pytest

from shared.config import digest, dump_yaml, failures_allowed, load, spec
from shared.errors import ConfigError
from stage1_localize.config import LocalizeConfig, PartConfig, describe_part, part_options
from stage1_localize.contracts import Region
from stage1_localize.grounders.planted import Planted


def config(**fields: object) -> LocalizeConfig:
    return load(LocalizeConfig, {"regions": {"spot": "disc"}, **fields})


def test_one_text_or_several_and_bare_part_names() -> None:
    made = config(regions={"a": "x  y", "b": ["y", "z"]}, grounder="planted")
    assert made.asked() == (Region("a", ("x y",)), Region("b", ("y", "z")))
    assert made.grounder == PartConfig(name="planted")
    assert made == load(LocalizeConfig, __import__("yaml").safe_load(dump_yaml(made)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"region": {}}, "Did you mean 'regions'"),
        ({"regions": {}}, "empty"),
        ({"regions": {"a": ["x", "x"]}}, "given twice"),
        ({"max_failures": 1.5}, "lies below 1"),
        ({"max_failures": -1}, "greater than or equal"),
        ({"workers": -1}, "expected 'auto'"),
        ({"grid_px": 30}, "multiple of 4"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_recipes_that_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**fields)


def test_how_a_run_goes_is_no_part_of_what_it_makes() -> None:
    base = digest(config())
    assert digest(config(workers=7, max_failures=3)) == base
    assert digest(config(micro_batch=4)) != base
    assert digest(config(regions={"spot": "cone"})) != base


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (3, 3), (0.1, 1), (0.0, 0), (1000, 1000)])
def test_a_count_or_a_fraction_may_fail(limit: float, allowed: int) -> None:
    assert failures_allowed(config(max_failures=limit).max_failures, 19) == allowed


def test_options_belong_to_their_part() -> None:
    part = PartConfig(name="planted", options={"score_milli": 500})
    options = part_options("grounder", part, Planted)
    assert options.score_milli == 500
    assert describe_part(part, options, Planted(options)) == {
        "name": "planted",
        "version": 1,
        "options": {"score_milli": 500, "level_milli": 800},
        "identity": {},
    }
    with pytest.raises(ConfigError, match=r"grounder\.options of 'planted': .*scoremilli.*Did you mean 'score_milli'"):
        part_options("grounder", PartConfig(name="planted", options={"scoremilli": 1}), Planted)


def test_a_spec_holds_no_float() -> None:
    def floats(value: object) -> bool:
        if isinstance(value, dict):
            return any(map(floats, value.values()))
        return any(map(floats, value)) if isinstance(value, list) else isinstance(value, float)

    assert not floats(spec(config()))
