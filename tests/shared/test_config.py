import pickle
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from shared.config import Strict, apply_override, digest, dump_yaml, load, runtime, spec
from shared.errors import ConfigError, DecodeError, InputMissingError, LockedError


class Policy(Strict):
    name: str = Field("region", description="Policy.")
    hide_inside: int = Field(700, ge=0, le=1000, description="Thousandths hidden inside.")


class Run(Strict):
    seed: int = Field(description="Seed.")
    rate: float = Field(0.1, description="Rate.")
    policy: Policy = Field(Policy(), description="Policy.")
    workers: int = runtime(2, "Workers.")
    sides: tuple[int, ...] = Field((1, 2), description="Sides.")
    most: Annotated[int | float | None, Field(ge=0)] | Literal["all"] = Field(1, description="Most.")
    quick: bool = Field(False, description="Quick.")
    either: bool | int = Field(0, description="Either.")


def test_every_problem_is_listed_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Run, {"policy": {"hide_insde": 3, "name": 7}, "sed": 1})
    message = str(caught.value)
    assert "policy.hide_insde: unknown key. Did you mean 'hide_inside'?" in message
    assert "sed: unknown key. Did you mean 'seed'?" in message
    assert "seed: required" in message
    assert "policy.name:" in message
    assert caught.value.exit_code == 2


def test_a_value_out_of_range_names_the_value_found() -> None:
    with pytest.raises(ConfigError, match=r"policy\.hide_inside: .*1000.*found 1001"):
        load(Run, {"seed": 1}, ["policy.hide_inside=1001"])


@pytest.mark.parametrize("where", ["seed", "rate", "policy.hide_inside", "sides", "most"])
def test_true_is_no_number(where: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{where}: expected a number \(found (True|\[True, 2\])\)$"):
        load(Run, {"seed": 1}, [f"{where}={'[true, 2]' if where == 'sides' else 'true'}"])


def test_true_is_true_where_it_is_meant() -> None:
    made = load(Run, {"seed": 1}, ["quick=true", "most=all", "either=true"])
    assert (made.quick, made.most, made.either) == (True, "all", True)


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", "seed.x=1", "seed=[1"])
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        apply_override({"seed": 1}, text)


def test_runtime_fields_do_not_enter_the_digest_and_results_do() -> None:
    base = load(Run, {"seed": 1})
    assert "workers" not in spec(base)
    assert digest(base) == digest(load(Run, {"seed": 1, "workers": 9}))
    assert digest(base) != digest(load(Run, {"seed": 2}))
    assert spec(base)["rate"] == "0.1"


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 1000))
def test_resolved_yaml_resolves_to_the_same_run(tmp_path_factory, seed: int, rate: float, hide: int) -> None:
    config = Run(seed=seed, rate=rate, policy=Policy(hide_inside=hide))
    path = tmp_path_factory.mktemp("yaml") / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert digest(load(Run, path)) == digest(config)


def test_a_recipe_that_is_absent_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        load(Run, tmp_path / "none.yaml")
    for text in ("- 1\n", "a: [", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load(Run, tmp_path / "bad.yaml")


def test_errors_cross_processes_whole() -> None:
    locked = pickle.loads(pickle.dumps(LockedError("m", hint="h")))
    assert (type(locked), str(locked), locked.hint) == (LockedError, "m", "h")
    decode = pickle.loads(pickle.dumps(DecodeError("m", reason="nonfinite")))
    assert decode.reason == "nonfinite"
