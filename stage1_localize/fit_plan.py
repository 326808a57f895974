"""What a fit will be: labels read and checked, words, folds, settings; nothing is computed and nothing written."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shared.artifact import Input
from shared.coco import CocoLabels, Labelled, read_coco
from shared.corpus import CorpusRow, corpus_id, list_corpus
from shared.decode import VERSION as DECODE_VERSION
from shared.errors import ConfigError, DecodeError, UsageError
from shared.images import find_sources
from shared.rng import uniform_u32
from stage1_localize.choose import VERSION as CHOICE_VERSION
from stage1_localize.fit import VERSION as FIT_VERSION
from stage1_localize.fit import FitSettings
from stage1_localize.fit_config import FitGrounderConfig
from stage1_localize.fit_tasks import WITH, WITHOUT, FitTask, Subject, read_labelled
from stage1_localize.grounders.lite_card import load_packaged
from stage1_localize.grounders.lite_text import MODEL_SHA256, far_from, fold
from stage1_localize.prompts import parse_regions
from stage1_localize.segmenters.lite_medsam_engines import identity_of

GROUPS_MIN = 2
FEW = 10
_SHOWN = 100
_STEPS_AN_IMAGE, _STEPS_MIN, _STEPS_MAX = 8, 150, 1200


@dataclass(frozen=True)
class Plan:
    """A fit that can begin.

    Attributes:
        config: Every ``auto`` resolved.
        labels: Of the regions that are learnt.
        corpus: The labelled images.
        foreign: Strings that are refused.
        taught: Those of them far enough from every wording to be taught as absent.
        warnings: What a user should know.
    """

    config: FitGrounderConfig
    labels: CocoLabels
    corpus: tuple[CorpusRow, ...]
    foreign: tuple[str, ...]
    taught: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def inputs(self) -> list[Input]:
        """The labelled images."""
        return [Input(role="images", kind="corpus", artifact_id=corpus_id(self.corpus))]

    @property
    def wordings(self) -> dict[str, tuple[str, ...]]:
        """Region -> its wordings as the vocabulary compares them."""
        return {name: tuple(map(fold, texts)) for name, texts in self.config.regions.items()}

    @property
    def settings(self) -> FitSettings:
        """Of every fit."""
        assert isinstance(self.config.steps, int)
        prompts = min(5, 2 + len(self.config.regions))
        return FitSettings(mix={WITH: 3, WITHOUT: 1}, prompts=prompts, steps=self.config.steps, foreign_share=0.3)

    def spec(self) -> dict[str, Any]:
        """What decides the head, as float-free JSON."""
        config, packaged = self.config, load_packaged().card
        settings = {key: value if isinstance(value, int | dict) else repr(value) for key, value in _flat(self.settings)}
        return {
            "regions": [
                {"name": name, "texts": list(texts), "outlined": name in self.labels.outlined}
                for name, texts in config.regions.items()
            ],
            "labels": {"images": len(self.labels.images), "sha256": self.labels.sha256},
            "exhaustive": config.exhaustive,
            "turns": config.turns,
            "lateral": list(config.lateral),
            "foreign": list(self.foreign),
            "fit": {"version": FIT_VERSION, **settings},
            "start": packaged.weights_sha256 if config.start == "packaged" else "scratch",
            "choice": {"version": CHOICE_VERSION, "folds": config.folds},
            "seed": str(config.seed),
            "encoder": dict(identity_of("onnxruntime")),
            "text_sha256": MODEL_SHA256,
            "decoding": {"version": DECODE_VERSION},
            "numeric": {"dtype": "float32", "device": "cpu", "threads": 1},
        }

    def subject(self, folder: Path) -> Subject:
        """What every fit in a run's folder shares."""
        config = self.config
        return Subject(
            folder=str(folder),
            regions=self.wordings,
            outlined=self.labels.outlined,
            exhaustive=config.exhaustive,
            lateral=frozenset(config.lateral),
            turns=config.turns,
            foreign=self.taught,
            settings=self.settings,
            seed=config.seed,
            packaged=config.start == "packaged",
        )

    def tasks(self, folder: Path, usable: Sequence[Labelled]) -> list[FitTask]:
        """One fit a fold, tried on the fold, and one on all usable images; images that say nothing are left out."""
        subject = self.subject(folder)
        said = [item for item in usable if self.config.exhaustive or _present(item, subject.regions)]
        present: dict[str, set[str]] = defaultdict(set)
        for item in said:
            present[_group(item)] |= _present(item, subject.regions)
        folds = assign_folds(
            {group: frozenset(names) for group, names in present.items()}, self.config.folds, self.config.seed
        )
        tried = [
            FitTask(
                f"fold-{number}",
                number,
                subject,
                tuple(item for item in said if folds[_group(item)] != number),
                tuple(item for item in said if folds[_group(item)] == number),
            )
            for number in sorted(set(folds.values()))
        ]
        return [*tried, FitTask("all", -1, subject, tuple(said))]


def plan(config: FitGrounderConfig, *, images: Path, labels: Path) -> Plan:
    """Read and check everything that a fit needs, but for the images' pixels.

    Raises:
        UsageError: Labels, regions or images that do not fit.
    """
    sources = find_sources(images.absolute())
    found = read_coco(labels, sources)
    config, warnings = _resolve(config, found)
    groups: dict[str, set[str]] = defaultdict(set)
    holding: dict[str, int] = defaultdict(int)
    for item in found.images:
        for name in _present(item, config.regions):
            groups[name].add(_group(item))
            holding[name] += 1
    for name in config.regions:
        if len(groups[name]) < GROUPS_MIN:
            raise UsageError(
                f"region '{name}': in {holding[name]} images of {len(groups[name])} groups, at least {GROUPS_MIN} "
                "groups are needed: some to learn from, others to be scored on",
                hint="label more images; groups come from the image list's column 'group'",
            )
        if holding[name] < FEW:
            warnings.append(f"region '{name}': only {holding[name]} images hold it; expect wide intervals")
    if all(item.source.group is None for item in found.images):
        warnings.append(
            "the images bring no groups: each counts as its own. If some show one patient, scores will be too good: "
            "give --images a list with a column 'group' or 'patient'"
        )
    unlabelled = len(sources) - len(found.images)
    if unlabelled:
        warnings.append(f"{unlabelled} of {len(sources)} images are not in the labels: they are not used")
    foreign = _foreign(config)
    taught = far_from([fold(text) for texts in config.regions.values() for text in texts], foreign)
    corpus = tuple(list_corpus([item.source for item in found.images]))
    digests = {row.sample_id: row.source_sha256 for row in corpus}
    listed = tuple(replace(item, source_sha256=digests[item.source.sample_id]) for item in found.images)
    found = replace(found, images=listed)
    return Plan(config, found, corpus, foreign, tuple(taught), tuple([*found.warnings, *warnings]))


def open_images(labels: Path, found: CocoLabels) -> tuple[list[Labelled], dict[str, DecodeError]]:
    """Decode every labelled image once: usable ones, and why others are not, by sample id.

    Raises:
        UsageError: Images of another size than the labels say; every one is named by its id in the labels.
        ImageChangedError: A file that is not the one the corpus lists.
    """
    usable: list[Labelled] = []
    failed: dict[str, DecodeError] = {}
    wrong = []
    for item in found.images:
        try:
            height, width = read_labelled(item).pixels.shape[1:]
        except DecodeError as error:
            failed[item.source.sample_id] = error
            continue
        if (width, height) != (item.width, item.height):
            wrong.append(f"image {item.image_id}: {width} x {height} px, the labels say {item.width} x {item.height}")
        usable.append(item)
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UsageError(
            f"labels {labels.name}: {len(wrong)} problems: {'; '.join(wrong[:_SHOWN])}{more}",
            hint="label the images as they are read here: upright, EXIF and TIFF orientation applied",
        )
    return usable, failed


def assign_folds(present: Mapping[str, frozenset[str]], folds: int, seed: int) -> dict[str, int]:
    """Deal groups into folds so that every fold gets its share of every mixture of regions.

    Args:
        present: Group -> regions of any of its images.
        folds: At most so many; fewer where there are fewer groups.
        seed: Of the order of groups with equal regions.
    """
    order = {name: int(uniform_u32("fit-grounder/folds", seed, name, 0, 1)[0]) for name in present}
    dealt = sorted(present, key=lambda name: (sorted(present[name]), order[name], name), reverse=True)
    return {name: place % min(folds, len(dealt)) for place, name in enumerate(dealt)}


def _resolve(config: FitGrounderConfig, found: CocoLabels) -> tuple[FitGrounderConfig, list[str]]:
    """Regions, laterality and steps spelled out."""
    used = {thing.region for item in found.images for thing in item.things}
    for name in [*config.regions, *(config.lateral if config.lateral != "auto" else ())]:
        if name not in used:
            near = difflib.get_close_matches(name, sorted(used), n=1)
            known = f"did you mean '{near[0]}'?" if near else f"categories with annotations: {', '.join(sorted(used))}"
            raise ConfigError(f"region '{name}': the labels hold no annotation of such a category", hint=known)
    if not used:
        raise UsageError("labels: no annotation that could be learnt from")
    asked = parse_regions({name: config.regions.get(name, (name,)) for name in found.regions if name in used})
    regions = {region.name: region.texts for region in asked}
    meant: dict[str, str] = {}
    for name, texts in regions.items():
        for text in texts:
            other = meant.setdefault(fold(text), name)
            if other != name:
                raise ConfigError(f"regions: '{text}' would mean both '{other}' and '{name}'")
    lateral = config.lateral
    if lateral == "auto":
        sides = {name: {word for text in texts for word in fold(text).split()} for name, texts in regions.items()}
        lateral = tuple(name for name, words in sides.items() if words & {"left", "right"})
    holding = sum(bool(item.things) for item in found.images)
    steps = config.steps
    if steps == "auto":
        steps = min(_STEPS_MAX, max(_STEPS_MIN, _STEPS_AN_IMAGE * holding))
    empty = [name for name in found.regions if name not in used]
    warnings = [f"categories without annotations are left out: {', '.join(empty)}"] if empty else []
    return config.model_copy(update={"regions": regions, "lateral": lateral, "steps": steps}), warnings


def _foreign(config: FitGrounderConfig) -> tuple[str, ...]:
    """Strings to refuse: those of the packaged head, and its own words where they are not what is learnt here."""
    own = {fold(text) for texts in config.regions.values() for text in texts}
    card = load_packaged().card
    others = [
        text
        for concept in card.concepts.values()
        if not own & set(concept.wordings)  # else the same thing under its other names
        for text in concept.wordings
    ]
    twice = sorted(own & set(map(fold, config.foreign)))
    if twice:
        raise ConfigError(f"foreign: '{twice[0]}' is a wording of a region")
    known = dict.fromkeys([*map(fold, config.foreign), *card.foreign, *others])
    return tuple(text for text in known if text not in own)


def _present(item: Labelled, regions: Mapping[str, Any]) -> set[str]:
    return {thing.region for thing in item.things if thing.region in regions}


def _group(item: Labelled) -> str:
    return item.source.group or item.source.sample_id


def _flat(settings: FitSettings) -> list[tuple[str, Any]]:
    return list(asdict(settings).items())
