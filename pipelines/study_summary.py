"""What a study's runs say so far: scores by arm, paired differences, verdicts on claims; published as one artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.study_check import run_differences, store_differences
from pipelines.study_config import ENCODER, StudyConfig
from pipelines.study_plan import Run, plan
from pipelines.study_report import study_page
from pipelines.study_stats import Compared, Place, compare, verdict
from shared.artifact import CARD, Artifact, Card, Input, publish, read_card, write_atomic
from shared.config import digest, dump_yaml, validate
from shared.config import spec as config_spec
from shared.errors import ConfigError, CorruptError, IncompatibleError, SpecMismatchError
from shared.runlog import scrub
from shared.workspace import begin, set_aside
from stage3_finetune.contracts import Predictions
from stage3_finetune.rescore import prediction_faults

VERSION = 2
"""Raised when equal runs give other numbers, or the numbers another form."""
NUMBERS = "study.json"
_LOWER = ("brier", "ece")
"""Scores of which less is better; a difference of them would read as the reverse."""


@dataclass(frozen=True)
class Table:
    """One endpoint of one corpus.

    Attributes:
        corpus: Its name.
        endpoint: Its name.
        arms: Those compared.
        rounds: Complete rounds, each image tested once in each; 0: folds of the first round only.
        folds: Complete in all arms.
        scores: Score -> all arms compared.
    """

    corpus: str
    endpoint: str
    arms: tuple[str, ...]
    rounds: int
    folds: int
    scores: Mapping[str, Compared]


@dataclass(frozen=True)
class Summary:
    """All that a study says.

    Attributes:
        tables: One an endpoint that has anything complete.
        claims: Claim, and what the differences say of it.
        done: Complete runs.
        total: All runs.
        open: Runs that are not complete, by name.
        hidden: Corpus and arm -> share of patches that was hidden: overall, inside and outside of the region.
    """

    tables: tuple[Table, ...]
    claims: tuple[tuple[str, str], ...]
    done: int
    total: int
    open: tuple[str, ...]
    hidden: Mapping[str, Mapping[str, tuple[float | None, ...]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def publish_study(config: StudyConfig, out: Path, command: str) -> Artifact:
    """Summarise what is complete and publish it in ``OUT/study``; an older state is kept aside."""
    cards = {run: run_cards(config, run, out) for run in plan(config)}
    folder = out / "study"
    folder.mkdir(exist_ok=True)
    models = {f"{name(run)}/{made}": card for run, own in cards.items() for made, card in own.items()}
    inputs = tuple(
        Input(role=role, kind=card.identity.kind, artifact_id=card.artifact_id) for role, card in sorted(models.items())
    )
    spec = told_spec(config)
    told: dict[str, Any] = {"kind": "study", "inputs": inputs, "spec": spec}
    supersedes = None
    try:
        _, card = begin(folder, **told, resolved=scrub(dump_yaml(config)))
    except SpecMismatchError:  # more runs are complete
        supersedes = read_card(folder, "study").artifact_id if (folder / CARD).is_file() else None
        set_aside(folder)
        folder.mkdir()
        _, card = begin(folder, **told, resolved=scrub(dump_yaml(config)))
    if card is not None:
        return Artifact(folder, card)
    summary = summarise(config, cards, out)
    body = json.dumps(_finite(summary.as_dict()), indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / NUMBERS, body.encode())
    lines = [json.dumps({"run": role, **card.model_dump(mode="json")}, sort_keys=True) for role, card in models.items()]
    write_atomic(folder / "cards.jsonl", ("\n".join(lines) + "\n").encode())
    write_atomic(folder / "report.html", study_page(config, summary).encode())
    outputs = {"runs": summary.done, "of": summary.total, "summary_sha256": digest(_thousandths(summary.as_dict()))}
    card = publish(
        folder,
        **told,
        outputs=outputs,
        command=command,
        metrics={"claims": dict(summary.claims)},
        supersedes=supersedes,
    )
    return Artifact(folder, card)


def told_spec(config: StudyConfig) -> dict[str, Any]:
    """What is in a study's id; the order of its parts too, since the first arm is what others are compared with."""
    corpora = [[name, list(corpus.endpoints)] for name, corpus in config.corpora.items()]
    return {"version": VERSION, "config": config_spec(config), "order": {"arms": list(config.arms), "corpora": corpora}}


def config_told(spec: Mapping[str, Any]) -> StudyConfig:
    """The settings of a published study, in the order that they had; a card's keys are sorted.

    Raises:
        KeyError, ConfigError: Not such a spec.
    """
    told, order = spec["config"], spec["order"]
    corpora = {
        name: {
            **told["corpora"][name],
            "endpoints": {key: told["corpora"][name]["endpoints"][key] for key in endpoints},
        }
        for name, endpoints in order["corpora"]
    }
    return validate(
        StudyConfig, {**told, "corpora": corpora, "arms": {name: told["arms"][name] for name in order["arms"]}}
    )


def name(run: Run) -> str:
    """A run in one line."""
    return f"{run.corpus}/round-{run.round}/fold-{run.fold}/{run.arm}"


def run_cards(config: StudyConfig, run: Run, out: Path) -> dict[str, Card]:
    """Cards of a run that are published, by ``encoder`` and endpoint."""
    folder = run.folder(out)
    wanted = config.made(run.corpus, run.arm)
    return {
        made: read_card(folder / made, ENCODER if made == ENCODER else "model")
        for made in wanted
        if (folder / made / CARD).is_file()
    }


def recompute(folder: Path, card: Card) -> list[str]:
    """What a published study says and its runs do not, by their predictions; call it on files that are whole.

    Args:
        folder: The study; its runs lie beside it.
        card: Its card.

    Raises:
        IncompatibleError: Of another version; a run that it names is not there, or is another one.
        CorruptError: Its settings or numbers cannot be read; a run's predictions are not those of its card.
    """
    spec = card.identity.spec
    if spec.get("version") != VERSION:
        raise IncompatibleError(f"a study of version {spec.get('version')}; this release computes version {VERSION}")
    try:
        config = config_told(spec)
        told = json.loads((folder / NUMBERS).read_bytes())
    except (ConfigError, OSError, KeyError, ValueError, RecursionError) as error:
        raise CorruptError(f"its settings or {NUMBERS} cannot be read: {error}") from None
    out = folder.parent
    wanted = {item.role: item.artifact_id for item in card.identity.inputs}
    cards = {run: run_cards(config, run, out) for run in plan(config)}
    cards = {run: {made: own[made] for made in own if f"{name(run)}/{made}" in wanted} for run, own in cards.items()}
    found = {f"{name(run)}/{made}": own[made].artifact_id for run, own in cards.items() for made in own}
    if missing := sorted(role for role in wanted if found.get(role) != wanted[role]):
        raise IncompatibleError(f"{len(missing)} of its runs are not beside it, or are others: {missing[0]}")
    for run, own in cards.items():
        for made in own:
            if faults := list(prediction_faults(run.folder(out) / made, own[made])) if made != ENCODER else []:
                raise CorruptError(f"{name(run)}/{made}: {faults[0][0]}: {faults[0][1]}")
    again = _thousandths(summarise(config, cards, out).as_dict())
    said = _thousandths(told) if isinstance(told, dict) else {}
    try:
        others = [*store_differences(config, out), *run_differences(config, cards, out)]
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CorruptError(f"settings of the study, or on a run's card, cannot be read: {error}") from None
    differing = [f"not of this study: {path.relative_to(out)}: {why}" for path, why in others]
    differing += [f"{key}: not what its runs say" for key in {**again, **said} if said.get(key, key) != again.get(key)]
    if digest(again) != card.identity.outputs["summary_sha256"]:
        differing.append("summary_sha256: another summary than the artifact's id")
    if dict(again["claims"]) != card.provenance.metrics.get("claims"):
        differing.append("claims on the card: not what its runs say")
    return differing


def summarise(config: StudyConfig, cards: Mapping[Run, Mapping[str, Card]], out: Path) -> Summary:
    """Compare what is complete in all arms of an endpoint."""
    tables = []
    for corpus, settings in config.corpora.items():
        for endpoint in settings.endpoints:
            table = _table(config, corpus, endpoint, cards, out)
            if table is not None:
                tables.append(table)
    open_ = [run for run, own in cards.items() if not set(config.made(run.corpus, run.arm)) <= set(own)]
    return Summary(
        tuple(tables),
        tuple((claim.text, _claim(claim, tables)) for claim in config.claims),
        len(cards) - len(open_),
        len(cards),
        tuple(map(name, open_)),
        _hidden(config, cards),
    )


def _table(
    config: StudyConfig, corpus: str, endpoint: str, cards: Mapping[Run, Mapping[str, Card]], out: Path
) -> Table | None:
    arms = config.measured(corpus, endpoint)
    planned = [(round_, fold) for round_ in range(config.rounds) for fold in range(config.folds)]
    complete = [place for place in planned if all(endpoint in cards[Run(corpus, *place, arm)] for arm in arms)]
    whole = [r for r in range(config.rounds) if all((r, fold) in complete for fold in range(config.folds))]
    used = [place for place in complete if place[0] in (whole or [0])]
    if not used or len(arms) < 2:
        return None
    places: dict[str, dict[str, list[Place]]] = {}
    for arm in arms:
        for place in used:
            tested = _tested(Run(corpus, *place, arm).folder(out) / endpoint)
            group = [row.group for row in tested.examples]
            for score, measure in tested.measures().items():
                if score not in _LOWER:
                    places.setdefault(score, {}).setdefault(arm, []).append(Place(measure, group))
    first = next(iter(places.values()))[arms[0]]
    if len({name for place in first for name in place.group}) < 2:
        return None
    pairs = config.compared(corpus, endpoint)
    scores = {
        score: compare(by_arm, pairs, config.overlap, seed=config.seed, resamples=config.resamples)
        for score, by_arm in places.items()
    }
    return Table(corpus, endpoint, arms, len(whole), len(used), scores)


def _tested(folder: Path) -> Predictions:
    """What a model predicted for its test part."""
    from stage3_finetune.tasks import TASKS

    card = read_card(folder, "model")
    kind: type[Predictions] = TASKS.load(str(card.identity.spec["config"]["task"])).Predictions
    return kind.load(folder / f"predictions{kind.suffix}").part("test")


def _claim(claim: Any, tables: Sequence[Table]) -> str:
    for table in tables:
        if (table.corpus, table.endpoint) != (claim.corpus, claim.endpoint):
            continue
        if claim.score not in table.scores:
            return f"no score '{claim.score}'; there are {', '.join(table.scores)}"
        for found in table.scores[claim.score].differences:
            if (found.arm, found.than) == (claim.arm, claim.than):
                return verdict(found, claim.milli / 1000)
    return "not run yet"


def _hidden(
    config: StudyConfig, cards: Mapping[Run, Mapping[str, Card]]
) -> dict[str, dict[str, tuple[float | None, ...]]]:
    found: dict[str, dict[str, tuple[float | None, ...]]] = {}
    for corpus in config.corpora:
        for arm in config.arms_of(corpus):
            encoders = [
                own[ENCODER] for run, own in cards.items() if (run.corpus, run.arm) == (corpus, arm) and ENCODER in own
            ]
            if encoders:
                columns = ("hidden_share", "hidden_inside_share", "hidden_outside_share")
                found.setdefault(corpus, {})[arm] = tuple(
                    _mean([e.provenance.metrics.get(c) for e in encoders]) for c in columns
                )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _thousandths(value: Any) -> Any:
    """The same without floats, for a digest: they may differ in the last digits between NumPy releases."""
    if isinstance(value, Mapping):
        return {str(key): _thousandths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thousandths(item) for item in value]
    if isinstance(value, float):
        return round(value * 1000) if np.isfinite(value) else None
    return value
