"""What a policy tells the sampler, and how a name and options become a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from shared.config import Strict, spec, validate
from shared.errors import IncompatibleError
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.budget import Counts


@dataclass(frozen=True)
class Tables:
    """What a policy makes of the level of a patch, whatever the sample.

    Attributes:
        stratum_of: Level -> stratum, 0 or 1.
        weight_of: Level -> weight, 1 .. 2^24.
        counts: How many patches of each stratum to hide.
    """

    stratum_of: UInt8[np.ndarray, "256"]
    weight_of: Int32[np.ndarray, "256"]
    counts: Counts


@dataclass(frozen=True)
class Plan:
    """Strata, weights and counts of a batch; the arguments of `draw_hidden` but for the names.

    Attributes:
        level: What the policy knows of each patch.
        stratum_of: Level -> stratum, 0 .. S - 1.
        weight_of: Level -> weight, 1 .. 2^24.
        num_hidden: How many patches of each stratum to hide, exactly.
        clamped: Samples whose budget could not be met as asked, because a stratum is too small.
    """

    level: UInt8[np.ndarray, "B L"]
    stratum_of: UInt8[np.ndarray, "256"]
    weight_of: Int32[np.ndarray, "256"]
    num_hidden: Int32[np.ndarray, "B S"]
    clamped: Bool[np.ndarray, "B"]


class Policy(Protocol):
    """Says where and how many. ``version`` rises when the same options give other plans.

    There are one or two ``strata``, by name.

    A policy that takes the region maps of other samples also has ``maps_of(samples, seed)``, see `maps_of`; one that
    not every region store serves ``check_grounder(name)``, with the name of what made the store.
    """

    Options: ClassVar[type[Strict]]
    version: ClassVar[int]
    strata: ClassVar[tuple[str, ...]]
    options: Strict

    def tables(self) -> Tables:
        """What becomes of a patch of each level: its mean coverage, 0 .. 254, or what `GuidedPolicy` makes of it."""
        ...


class GuidedPolicy(Policy, Protocol):
    """Follows a network: ``guide`` says what a teacher is asked for (`stage2_pretrain.guide`)."""

    guide: ClassVar[Literal["loss", "attention"]]

    def levels(self, score: Float32[np.ndarray, "B L"], coverage: UInt8[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B L"]:
        """What `tables` takes, from the teacher's score and the coverage of each patch. Each sample by itself."""
        ...

    def gives(self, levels: UInt8[np.ndarray, "B L"]) -> Bool[np.ndarray, "B"]:
        """Whether `levels` can have given these, for an audit: of each sample."""
        ...


def guide_of(policy: Policy) -> Literal["loss", "attention"] | None:
    """What a policy asks a teacher for, or None where the region maps are all it needs."""
    asked: Literal["loss", "attention"] | None = getattr(policy, "guide", None)
    return asked


def plan_batch(policy: Policy, level: UInt8[np.ndarray, "B L"]) -> Plan:
    """Plan a batch from what the policy knows of each patch. Each sample by itself."""
    tables = policy.tables()
    hidden, clamped = tables.counts.of((tables.stratum_of[level] == 0).sum(1), level.shape[1])
    return Plan(level, tables.stratum_of, tables.weight_of, hidden[:, : len(policy.strata)], clamped)


def maps_of(policy: Policy, samples: int, seed: int) -> Int64[np.ndarray, "N"]:
    """Whose region maps each sample of a run is masked by: an index for each, its own for most policies."""
    own = np.arange(samples)
    return policy.maps_of(samples, seed) if hasattr(policy, "maps_of") else own


def equal_weights() -> Int32[np.ndarray, "256"]:
    """The weight table of a policy that prefers no patch within a stratum."""
    return np.ones(256, np.int32)


def build_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Build a policy by name.

    Args:
        name: A name in `POLICIES`.
        options: Plain data for its ``Options``.

    Raises:
        ConfigError: Unknown name, or options that do not fit.
    """
    part = POLICIES.load(name)
    policy: Policy = part(validate(part.Options, options or {}))
    return policy


def policy_spec(name: str, policy: Policy) -> dict[str, Any]:
    """What a card holds of a policy: name, version and every option, defaults included."""
    return {"name": name, "version": policy.version, "options": spec(policy.options)}


def policy_of_card(section: Mapping[str, Any]) -> Policy:
    """Build the policy that a card names.

    Raises:
        IncompatibleError: The card's policy has another version than this release's.
        ConfigError: As `build_policy`.
    """
    policy = build_policy(section["name"], section["options"])
    if section["version"] != policy.version:
        raise IncompatibleError(
            f"policy {section['name']}: version {section['version']}, this release has {policy.version}",
            hint="use the release that wrote the artifact",
        )
    return policy
