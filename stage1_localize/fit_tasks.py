"""What the processes of `fit_grounder` do: embed an image; fit a head on some images and try it on the others.

A task leaves its result in ``run/`` by a rename, so that what was finished is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shared.artifact import write_atomic
from shared.coco import Labelled
from shared.errors import CorruptError
from shared.images import Image, read_image
from shared.outlines import draw
from stage1_localize.choose import Trier, Try, candidates, try_image
from stage1_localize.contracts import Batch
from stage1_localize.fit import Example, FitSettings, fit_head
from stage1_localize.fit_pool import refuse_if_stopped
from stage1_localize.grounders.lite_card import build_head, load_packaged
from stage1_localize.grounders.lite_text import encode_text
from stage1_localize.pictures import Picture, as_case, as_example, cache_path, cached_encode
from stage1_localize.segmenters.lite_medsam import LiteMedSam, encoder_key

EMBEDDINGS = "run/embeddings"
FITS = "run/fits"
WITH, WITHOUT = "with", "without"


class ImageChangedError(CorruptError):
    """An image is not the one that the run's corpus lists."""

    kind = "source-changed"


@dataclass(frozen=True)
class Subject:
    """What is learnt and how; equal for all fits of a head.

    Attributes:
        folder: Of the run.
        regions: Region -> its wordings, folded.
        outlined: Regions whose outlines are used.
        exhaustive: Whether no annotation means absent.
        lateral: Regions that a mirrored image would falsify.
        turns: Whether images have no up.
        foreign: Strings taught to mean no region.
        settings: Of every fit.
        seed: Of every fit.
        packaged: Whether fits begin with the packaged weights.
    """

    folder: str
    regions: Mapping[str, tuple[str, ...]]
    outlined: frozenset[str]
    exhaustive: bool
    lateral: frozenset[str]
    turns: bool
    foreign: tuple[str, ...]
    settings: FitSettings
    seed: int
    packaged: bool


@dataclass(frozen=True)
class FitTask:
    """One fit: its name, the images it learns from, and those it is tried on."""

    name: str
    fold: int
    subject: Subject
    train: tuple[Labelled, ...]
    held_out: tuple[Labelled, ...] = ()

    @property
    def images_sha256(self) -> str:
        """Digest of which images it learns from and is tried on: a kept result of others is not this one's."""
        parts = [[item.source.sample_id for item in items] for items in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_labelled(item: Labelled) -> Image:
    """Read an image of the labels.

    Raises:
        DecodeError: It cannot be read.
        ImageChangedError: It is not the file that the corpus lists.
    """
    image = read_image(item.source)
    if item.source_sha256 not in ("", image.source_sha256):
        raise ImageChangedError(
            f"{item.source.sample_id}: the file is not the one that this run began with",
            hint="put the image back, or begin a new run with --fresh",
        )
    return image


def embed(task: tuple[str, Labelled]) -> str:
    """Put an image's embedding into the cache; returns its sample id."""
    folder, item = task
    torch.set_num_threads(1)
    cached_encode(read_labelled(item).pixels, Path(folder) / EMBEDDINGS)
    return item.source.sample_id


def fit(task: FitTask) -> str:
    """Fit a head, try it on the held-out images, keep both; returns the task's name."""
    torch.set_num_threads(1)
    subject = task.subject
    start = load_packaged().network.state_dict() if subject.packaged else None
    examples = [_example(item, subject) for item in task.train]
    state = fit_head(
        examples,
        subject.regions,
        subject.foreign,
        encode_text,
        _mix(subject.settings, examples),
        seed=subject.seed,
        start=start,
        report=lambda step, loss: refuse_if_stopped(),
    )
    tries = _try(task, state) if task.held_out else {}
    folder = Path(subject.folder) / FITS
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{task.name}.safetensors", save(state))
    told = {
        "images": task.images_sha256,
        "tries": {name: [[t.as_dict() for t in row] for row in rows] for name, rows in tries.items()},
    }
    write_atomic(folder / f"{task.name}.json", json.dumps(told).encode())  # last: who finds it finds the weights
    return task.name


def read_fit(task: FitTask) -> tuple[dict[str, Tensor], dict[str, list[list[Try]]]] | None:
    """State and tries of a finished fit; None if there is none, or it is damaged or of other images."""
    folder = Path(task.subject.folder) / FITS
    try:
        told = json.loads((folder / f"{task.name}.json").read_bytes())
        if told["images"] != task.images_sha256:
            return None
        tries = {region: [[Try(**one) for one in row] for row in rows] for region, rows in told["tries"].items()}
        return load((folder / f"{task.name}.safetensors").read_bytes()), tries
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def as_picture(item: Labelled, subject: Subject, image: Image | None = None) -> Picture:
    """An image with what its annotations say of the subject's regions."""
    pixels = (image or read_labelled(item)).pixels
    height, width = pixels.shape[1:]
    boxes: dict[str, list[Sequence[float]]] = {}
    masks: dict[str, Float32[np.ndarray, "H W"]] = {}
    for thing in item.things:
        if thing.region not in subject.regions or thing.region in item.unknown:
            continue
        boxes.setdefault(thing.region, []).append(thing.box_xyxy_px)
        if thing.region in subject.outlined and thing.outline is not None:
            drawn = draw(thing.outline, height, width)
            masks[thing.region] = np.maximum(masks.get(thing.region, np.float32(0)), drawn)
    absent = frozenset(subject.regions) - boxes.keys() - item.unknown if subject.exhaustive else frozenset[str]()
    return Picture(
        source=WITH if boxes else WITHOUT,
        group=item.source.group or item.source.sample_id,
        image=pixels,
        masks=masks,
        boxes={name: np.array(rows, np.float32) for name, rows in boxes.items()},
        absent=absent,
    )


def batch_of(picture: Picture, folder: Path) -> Batch:
    """A batch of one image with its cached embedding where the encoder would put its own."""
    batch = Batch([picture.image])
    batch.memo(encoder_key(), lambda: [cached_encode(picture.image, folder / EMBEDDINGS)])
    return batch


def tried_of(subject: Subject) -> dict[str, list[Any]]:
    """Candidates of every region."""
    return {name: candidates(texts, name in subject.outlined) for name, texts in subject.regions.items()}


def _example(item: Labelled, subject: Subject) -> Example:
    refuse_if_stopped()
    picture = as_picture(item, subject)
    cache = Path(subject.folder) / EMBEDDINGS
    example = as_example(picture, cached_encode(picture.image, cache), lateral=subject.lateral, turns=subject.turns)
    return replace(example, embedding=np.load(cache_path(picture.image, cache), mmap_mode="r"))


def _mix(settings: FitSettings, examples: Sequence[Example]) -> FitSettings:
    """Batches of the same size whether or not there are images without any region."""
    found = {example.source for example in examples}
    size = sum(settings.mix.values())
    return settings if found == {WITH, WITHOUT} else replace(settings, mix=dict.fromkeys(found, size))


def _try(task: FitTask, state: Mapping[str, Tensor]) -> dict[str, list[list[Try]]]:
    trier, tried = Trier(build_head(state), LiteMedSam(LiteMedSam.Options())), tried_of(task.subject)
    tries: dict[str, list[list[Try]]] = {}
    for item in task.held_out:
        refuse_if_stopped()
        picture = as_picture(item, task.subject)
        batch = batch_of(picture, Path(task.subject.folder))
        for name, row in try_image(trier, as_case(picture), batch, tried, task.fold).items():
            tries.setdefault(name, []).append(row)
    return tries
