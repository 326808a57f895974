"""``mwm init``: a commented recipe for the user's own images, from a look at them.

The comments are the descriptions of the settings themselves. A line behind ``#`` without a space is a setting at
its default: take the ``#`` away to change it. A line behind ``# `` is words.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

import stage1_localize
from pipelines.chain import ChainConfig
from shared.config import validate
from shared.errors import DecodeError, UsageError
from shared.forecast import spread
from shared.pseudonyms import unsalted
from shared.workspace import refuse_unwritable
from stage2_pretrain.config import PretrainConfig
from stage3_finetune.config import FinetuneConfig

_LOOK = 24
_WIDTH = 112
_REGION = {"brain": "brain"}
_SMALL_PX = 160


@dataclass(frozen=True)
class Corpus:
    """What a look at some images says.

    Attributes:
        count: Samples.
        formats: Suffix -> files.
        colour: Whether most of those opened are colour.
        height_px: Smallest, median and largest height of those opened.
        width_px: Likewise.
        groups: Groups, 0 where none are given.
        unreadable: Of those opened.
        looked: How many were opened.
    """

    count: int
    formats: Mapping[str, int]
    colour: bool
    height_px: tuple[int, int, int]
    width_px: tuple[int, int, int]
    groups: int
    unreadable: int
    looked: int

    def lines(self) -> list[str]:
        """For the head of the recipe."""
        formats = ", ".join(f"{count} {suffix}" for suffix, count in self.formats.items())
        height, width = (_span(sides) for sides in (self.height_px, self.width_px))
        found = [
            f"Found: {self.count} samples in {formats} files, {'colour' if self.colour else 'grey'}, "
            f"{height} px high, {width} px wide; {self.looked} of them were opened."
        ]
        if self.unreadable:
            found.append(f"{self.unreadable} of the {self.looked} could not be read: they would be quarantined.")
        if self.groups:
            found.append(f"{self.groups} groups (patients) keep together in a split.")
        else:
            found.append(
                "No groups: if several images show one patient, give labels, or a list, with a column 'group'."
            )
        return found


def _span(sides: tuple[int, int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[2] else f"{sides[0]} to {sides[2]}"


def look_at(images: Path) -> Corpus:
    """Open some images, evenly spread.

    Raises:
        UsageError: There are none, or none of those opened can be read.
    """
    from shared.images import SUFFIXES, find_sources, read_image

    sources = find_sources(images)
    files = {source.path for source in sources}
    endings = sorted(SUFFIXES, key=len, reverse=True)
    formats = Counter(next((end[1:] for end in endings if path.name.lower().endswith(end)), "other") for path in files)
    shapes, unreadable = [], 0
    places = spread(len(sources), _LOOK)
    for place in places:
        try:
            shapes.append(read_image(sources[place]).pixels.shape)
        except DecodeError:
            unreadable += 1
    if not shapes:
        raise UsageError(
            f"images {images}: none of {len(places)} opened can be read", hint="mwm localize --dry-run tells why"
        )
    spans = [
        (min(sides), int(statistics.median(sides)), max(sides))
        for sides in ([s[1] for s in shapes], [s[2] for s in shapes])
    ]
    return Corpus(
        count=len(sources),
        formats=dict(formats.most_common()),
        colour=2 * sum(shape[0] == 3 for shape in shapes) > len(shapes),
        height_px=spans[0],
        width_px=spans[1],
        groups=len({source.group for source in sources if source.group}),
        unreadable=unreadable,
        looked=len(places),
    )


def choose(corpus: Corpus | None) -> dict[str, dict[str, Any]]:
    """The settings that a recipe begins with: those that every user sets, as a look at the images suggests."""
    chosen: dict[str, dict[str, Any]] = {"localize": {"regions": dict(_REGION)}}
    for section, model in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        defaults = {name: model.model_fields[name].default for name in ("size_px", "epochs", "batch_size")}
        if corpus is not None:
            if max(corpus.height_px[1], corpus.width_px[1]) <= _SMALL_PX:
                defaults["size_px"] = 128
            # A few batches an epoch at least: the schedule is counted in epochs, and one step is a poor one.
            batch = 2 ** (max(corpus.count // 4, 8).bit_length() - 1)
            defaults["batch_size"] = min(defaults["batch_size"], batch)
            if corpus.colour and section == "pretrain":
                defaults["channels"] = 3
        chosen[section] = defaults
    return chosen


@unsalted()
def write_recipe(out: Path, images: Path | None, labels: Path | None) -> Corpus | None:
    """Write a recipe that validates.

    Args:
        out: File to write; must not exist.
        images: To look at, or None.
        labels: With them the recipe finetunes, else that section is a comment.

    Returns:
        What was seen.

    Raises:
        UsageError: ``out`` exists or cannot be written; the images cannot be used.
        InputMissingError: No such images or labels.
        ConfigError: The labels table cannot be used.
    """
    if out.exists():
        raise UsageError(f"--out {out}: exists already", hint="name another file; nothing is overwritten")
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: a recipe ends in .yaml")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist")
    refuse_unwritable(out.parent)
    corpus = look_at(images) if images is not None else None
    if labels is not None:
        from stage3_finetune.labels import read_table

        examples, grouped = read_table(labels, {})
        if corpus is not None and grouped:
            corpus = replace(corpus, groups=len({example.group for example in examples}))
    text = recipe_text(corpus, choose(corpus), finetunes=labels is not None)
    validate(ChainConfig, yaml.safe_load(text))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"--out {out}: exists already") from None
    return corpus


def recipe_text(corpus: Corpus | None, chosen: Mapping[str, Mapping[str, Any]], *, finetunes: bool) -> str:
    """The recipe with a comment above each setting."""
    lines = _words("A recipe for 'mwm run', written by 'mwm init'.")
    for text in corpus.lines() if corpus else ():
        lines += _words(text)
    lines += _words(
        "A setting behind '#' without a space is at its default: take the '#' away and change it. "
        "Name your regions first. What a run would cost: mwm run THIS_FILE --images ... --dry-run"
    )
    for section, field in ChainConfig.model_fields.items():
        lines.append("")
        model = _model(field.annotation)
        if model is None:
            lines += [*_words(str(field.description)), f"#{section}: {_flow(field.default)}"]
        elif section == "finetune" and not finetunes:
            lines += _words("Stage 3 needs --labels, a CSV with the columns sample_id and label. With it:")
            lines.append(f"#{section}: {_flow(dict(chosen[section]))}")
        else:
            lines += [*_words(str(field.description)), f"{section}:"]
            lines += [f"  {line}" for line in _settings(model, chosen[section])]
    return "\n".join(lines) + "\n"


def _settings(model: type[BaseModel], given: Mapping[str, Any]) -> Iterator[str]:
    """Every field: its description, then the chosen value, or the default behind ``#``."""
    for name, field in model.model_fields.items():
        yield from _words(str(field.description))
        nested = _model(field.annotation)
        for inner, part in nested.model_fields.items() if nested else ():
            yield from _words(f"- {inner}: {part.description}")
        if name == "regions":
            yield from _words(f"CHANGE THIS: the default grounder knows {', '.join(_vocabulary())}, and near synonyms.")
        if name in given:
            yield f"{name}: {_flow(given[name])}"
        else:
            yield f"#{name}: {_flow(field.get_default(call_default_factory=True))}"


def _vocabulary() -> list[str]:
    """What the packaged grounder knows, from its card; its model is not loaded."""
    card = Path(stage1_localize.__file__).parent / "weights" / "lite.json"
    return list(json.loads(card.read_text(encoding="utf-8"))["concepts"])


def _words(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _model(annotation: Any) -> type[BaseModel] | None:
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
