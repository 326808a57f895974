"""What a study is told: corpora, arms, endpoints, folds. Importing this loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config import Strict, runtime
from stage1_localize.config import LocalizeConfig
from stage2_pretrain.config import PretrainConfig
from stage3_finetune.config import FinetuneConfig

ENCODER = "encoder"
"""Folder of a run's encoder; its models have the names of their endpoints."""


class ArmConfig(Strict):
    """One way to pretrain, or none."""

    pretrain: dict[str, Any] | None = Field(
        None, description="What differs from the study's 'pretrain'; null: from scratch. {}: as it stands there."
    )
    store: Literal["localized", "cross-fitted", "oracle"] = Field(
        "localized",
        description="Region maps of the words by the study's grounder; by heads that are fitted on the corpus' "
        "outlines, each image answered by the one that never saw its group; or of the outlines (policy oracle).",
    )
    corpora: tuple[str, ...] | None = Field(None, description="Corpora where the arm is run; null: all.")


class EndpointConfig(Strict):
    """One way to measure an encoder on a corpus."""

    finetune: dict[str, Any] = Field(default_factory=dict, description="What differs from the study's 'finetune'.")
    scratch: bool = Field(True, description="Whether it means anything without pretraining; a frozen probe does not.")


class CorpusConfig(Strict):
    """One set of images with labels."""

    images: str = Field(description="List of images, relative to --images: columns image, sample_id, group.")
    labels: str = Field(description="Labels of the task, relative to --images: a table with groups, without parts.")
    outlines: str | None = Field(
        None, description="COCO JSON of outlines, for arms of such stores; relative to --images."
    )
    regions: Any = Field(description="The one list of prompts of this corpus, as in a recipe's 'localize.regions'.")
    store: str | None = runtime(None, "A published region store of these images, PATH[@sha256:...]; null: localize.")
    supervised: bool = Field(
        False,
        description="The grounder was taught by this corpus' labels: its regions are not the words' alone.",
    )
    endpoints: dict[str, EndpointConfig] = Field(description="What is measured, by name; the first is the main one.")


class ClaimConfig(Strict):
    """A difference that a paper claims."""

    text: str = Field(description="The claim in words.")
    corpus: str = Field(description="Where it is tried.")
    endpoint: str = Field(description="How it is measured.")
    score: str = Field(description="Which score, as the report names it.")
    arm: str = Field(description="Arm that is to be better.")
    than: str = Field(description="Arm that it is compared with.")
    milli: int = Field(description="By how much, in thousandths of the score.")


class StudyConfig(Strict):
    """A fair comparison of mask policies: same images, same budgets, grouped folds, paired differences."""

    corpora: dict[str, CorpusConfig] = Field(min_length=1, description="Sets of images, by name.")
    arms: dict[str, ArmConfig] = Field(
        min_length=2, description="Ways to pretrain, by name; the first is the baseline."
    )
    claims: tuple[ClaimConfig, ...] = Field((), description="What papers claim, to be held against the differences.")
    pairs: tuple[tuple[str, str], ...] | None = Field(
        None, description="Which arm is compared with which, beside those of claims; null: each with the first."
    )
    localize: dict[str, Any] = Field(default_factory=dict, description="Settings of stage 1 beside the regions.")
    pretrain: PretrainConfig = Field(description="Settings of stage 2 that all arms share.")
    finetune: FinetuneConfig = Field(description="Settings of stage 3 that all arms share.")
    folds: int = Field(5, ge=2, le=20, description="Grouped folds; each image is tested once a round.")
    rounds: int = Field(1, ge=1, le=20, description="Other partitions into folds, with other seeds.")
    val_milli: int = Field(
        150, ge=0, le=500, description="Share of val among the groups outside of the tested fold, in thousandths."
    )
    pilot_spread_milli: int = Field(
        250,
        ge=1,
        le=1000,
        description="How much a score varies over single groups (standard deviation), in "
        "thousandths, as a pilot gave it: what the study can show is told before it runs.",
    )
    pilot_correlation_milli: int = Field(
        700, ge=0, le=999, description="Correlation of two arms' scores over groups, assumed, in thousandths."
    )
    resamples: int = Field(2000, ge=100, le=100_000, description="Bootstrap resamples of groups.")
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of the folds; a run's own seed is this + round * folds + fold."
    )
    jobs: int = runtime(1, "Runs at a time, each with 'threads' threads.", ge=1, le=64)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        problems = []
        for name, arm in self.arms.items():
            problems += [f"arms.{name}.corpora: no corpus '{c}'" for c in arm.corpora or () if c not in self.corpora]
            if arm.store != "localized":
                own = arm.corpora or tuple(self.corpora)
                problems += [
                    f"arms.{name}: corpus '{c}' has no outlines for {arm.store} regions; name others in 'corpora'"
                    for c in own
                    if c in self.corpora and self.corpora[c].outlines is None
                ]
        problems += [
            f"corpora.{name}.endpoints: '{ENCODER}' is the folder of encoders; name it otherwise"
            for name, corpus in self.corpora.items()
            if ENCODER in corpus.endpoints
        ]
        problems += [f"pairs: no arm '{arm}'" for arm in sorted({*sum(self.pairs or (), ())}) if arm not in self.arms]
        for number, claim in enumerate(self.claims):
            known: dict[str, dict[str, Any]] = {"corpus": {**self.corpora}, "arm": {**self.arms}, "than": {**self.arms}}
            problems += [
                f"claims[{number}].{key}: no {key} '{getattr(claim, key)}'"
                for key, table in known.items()
                if getattr(claim, key) not in table
            ]
            if claim.corpus in self.corpora and claim.endpoint not in self.corpora[claim.corpus].endpoints:
                problems.append(f"claims[{number}].endpoint: corpus '{claim.corpus}' has no '{claim.endpoint}'")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def localize_config(self, corpus: str, **parts: Any) -> LocalizeConfig:
        """Stage 1 for a corpus: its one prompt list; words that differ between images would tell labels."""
        return LocalizeConfig.model_validate({**self.localize, "regions": self.corpora[corpus].regions, **parts})

    def stores(self, corpus: str) -> set[str]:
        """Kinds of region maps that a corpus needs."""
        return {arm.store for arm in self.arms_of(corpus).values() if arm.pretrain is not None}

    @property
    def overlap(self) -> float:
        """Test over training images of a fold."""
        return 1 / ((self.folds - 1) * (1 - self.val_milli / 1000))

    def made(self, corpus: str, arm: str) -> tuple[str, ...]:
        """What a run of an arm makes: an encoder, unless it starts from scratch, and a model an endpoint."""
        endpoints = self.corpora[corpus].endpoints
        if self.arms[arm].pretrain is not None:
            return ENCODER, *endpoints
        return tuple(name for name, endpoint in endpoints.items() if endpoint.scratch)

    def measured(self, corpus: str, endpoint: str) -> tuple[str, ...]:
        """Arms that an endpoint of a corpus measures."""
        return tuple(name for name in self.arms_of(corpus) if endpoint in self.made(corpus, name))

    def compared(self, corpus: str, endpoint: str) -> list[tuple[str, str]]:
        """Pairs of these arms, each once: the study's, and those of the claims that are tried here."""
        arms, here = self.measured(corpus, endpoint), (corpus, endpoint)
        pairs = [(arm, arms[0]) for arm in arms[1:]] if self.pairs is None else list(self.pairs)
        pairs += [(claim.arm, claim.than) for claim in self.claims if (claim.corpus, claim.endpoint) == here]
        return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(arms)]

    def arms_of(self, corpus: str) -> dict[str, ArmConfig]:
        """Arms that are run on a corpus."""
        return {name: arm for name, arm in self.arms.items() if arm.corpora is None or corpus in arm.corpora}
