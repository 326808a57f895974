"""`predict`: a published model on new images, its answers in the frame of each image as it was read.

The folder is made aside and renamed in last. An image that cannot be read is quarantined with a reason, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from pipelines.answers import USUAL, WRITERS
from pipelines.answers.contract import Asked, Place, Writer
from pipelines.aside import made_aside, refuse_taken
from pipelines.exportable_store import make_durable
from pipelines.markdown import as_text
from pipelines.predict_config import PredictConfig
from shared.artifact import NOT_FOR_DIAGNOSIS, Card, full_disk_is_named, open_artifact, refuse_without_room, verify
from shared.config import failures_allowed
from shared.cores import resolve_device, resolve_threads
from shared.errors import ConfigError, CorruptError, DecodeError, IncompatibleError, QuarantineError, UsageError
from shared.images import Source, find_sources, read_image
from shared.loader import load_ahead
from shared.merkle import tensor_digest
from shared.region_layout import QUARANTINE
from stage3_finetune.contracts import Batch, Task
from stage3_finetune.data import squash, work_on
from stage3_finetune.tasks import TASKS

NOTE = "README.md"
PROVENANCE = "predict.json"
FORMAT_VERSION = 1
_TEXTS_BYTES = 1 << 20
_RESTORE = "restore the artifact from a copy"


@dataclass(frozen=True)
class Predicted:
    """What was made.

    Attributes:
        path: The folder.
        to: Name of the writer.
        task: Of the model.
        artifact_id: Of the model.
        images: Found.
        predicted: Of them.
        quarantined: Reason -> images that could not be read.
        left_out: Reason -> images that the format cannot hold.
        files: Names at the top of the folder.
    """

    path: Path
    to: str
    task: str
    artifact_id: str
    images: int
    predicted: int
    quarantined: Mapping[str, int]
    left_out: Mapping[str, int]
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "path": self.path.as_posix()}


@dataclass(frozen=True)
class _Read:
    """An image as the model sees it, or why it cannot be read."""

    source: Source
    image: Float32[Tensor, "C S S"] | None
    size_px: tuple[int, int] = (0, 0)
    spacing_mm: tuple[float, float] | None = None
    fault: DecodeError | None = None


def predict(
    reference: str,
    *,
    images: Path,
    out: Path,
    to: str | None = None,
    config: PredictConfig | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Predicted:
    """Apply a model to every image.

    Args:
        reference: ``PATH[@sha256:...]`` of a model.
        images: Folder or list.
        out: Folder; absent or empty.
        to: A name of `pipelines.answers.WRITERS`; None: what is usual for the task.
        config: How to compute.
        tell: Told how many images are done, of how many.

    Raises:
        ConfigError: A format that is not there, a device that this machine lacks.
        UsageError: A format that cannot hold this task's answers; ``out`` is a file or not empty.
        InputMissingError, IncompatibleError, LockedError: No model, or no images.
        CorruptError: The model is not what was published.
        QuarantineError: More images cannot be read than ``max_failures`` allows; nothing is kept.
        DriftError: Read back, a file is something else; nothing is kept.
        DiskFullError: No room.
    """
    config = config or PredictConfig()
    refuse_taken(out)
    task, card = open_model(reference, config.device)
    name = str(card.identity.spec["config"]["task"])
    to = USUAL[task.kind] if to is None else to
    kind: type[Writer] = WRITERS.load(to)
    if task.kind not in kind.kinds:
        fitting = ", ".join(other for other in WRITERS if task.kind in WRITERS.load(other).kinds)
        raise UsageError(f"--to {to}: not for the task '{name}'", hint=f"--to {fitting}")
    sources = find_sources(images)
    torch.set_num_threads(resolve_threads(config.threads))
    with made_aside(out) as folder:
        refuse_without_room(folder, _TEXTS_BYTES, "the predictions")
        with full_disk_is_named(folder, _TEXTS_BYTES):
            several = getattr(getattr(task, "options", None), "multi_label", False) is True
            writer = kind(Asked(folder, task.classes, task.kind, several, card.artifact_id, sources))
            refused = {source.sample_id: why for source in sources if (why := writer.refuses(source)) is not None}
            kept = [source for source in sources if source.sample_id not in refused]
            faults = _apply(task, kept, writer, config, tell)
            writer.close()
            reasons, left_out = Counter(fault.reason for fault in faults.values()), Counter(refused.values())
            _refuse_failures(config, faults, reasons, len(kept))
            facts = {
                "format": f"mwm-predict-{to}",
                "format_version": FORMAT_VERSION,
                "notice": NOT_FOR_DIAGNOSIS,
                "model": {"artifact_id": card.artifact_id, "tool": card.provenance.tool, "task": name},
                "classes": list(task.classes),
                "preprocessing": {**asdict(task.preprocessing), "resized": "squashed to a square, bilinear"},
                "settings": config.model_dump(mode="json"),
                "images": {"found": len(sources), "predicted": len(kept) - len(faults)},
                "quarantined": dict(reasons),
                "left_out": dict(left_out),
            }
            _write_texts(folder, facts, writer.notes(), faults)
            make_durable(folder)
        files = tuple(sorted(path.name for path in folder.iterdir()))
    return Predicted(
        out, to, name, card.artifact_id, len(sources), len(kept) - len(faults), dict(reasons), dict(left_out), files
    )


def open_model(reference: str, device: str = "cpu") -> tuple[Task, Card]:
    """A published model, every file and tensor checked, ready to predict.

    Raises:
        InputMissingError, IncompatibleError, LockedError: As `shared.artifact.open_artifact`; an unknown task.
        CorruptError: It is not what was published.
        ConfigError: This machine lacks the device.
    """
    path, card = open_artifact(reference, "model")
    for finding in verify(path, card):
        if finding.file.startswith("model/"):
            raise CorruptError(f"{path}: {finding.file}: {finding.problem}", hint=_RESTORE)
    try:
        kind = TASKS.load(str(card.identity.spec["config"]["task"]))
    except (KeyError, TypeError):
        raise IncompatibleError(f"{path}: its card does not say what task it is of") from None
    except ConfigError as error:
        raise IncompatibleError(f"{path}: this release does not know its task: {error}", hint=error.hint) from None
    task: Task = kind.restore(path / "model")
    weights = {name: value.numpy() for name, value in task.model.state_dict().items()}
    if tensor_digest(weights) != card.identity.outputs["weights"]:
        raise CorruptError(f"{path}: other weights than the artifact's id", hint=_RESTORE)
    task.model.to(resolve_device(device)).eval()
    return task, card


def _apply(
    task: Task, sources: Sequence[Source], writer: Writer, config: PredictConfig, tell: Callable[[int, int], None]
) -> dict[str, DecodeError]:
    """Predict and write; returns what could not be read."""
    faults: dict[str, DecodeError] = {}
    step, row = config.batch_size, 0
    parts = [sources[first : first + step] for first in range(0, len(sources), step)]
    with closing(load_ahead(lambda part: _read(task, part), parts)) as made, torch.inference_mode():
        for part in made:
            good = [item for item in part if item.image is not None]
            answers = iter(task.predict(_batch(good)) if good else ())
            for item in part:
                if item.fault is not None:
                    faults[item.source.sample_id] = item.fault
                    writer.skip(item.source)
                else:
                    writer.put(Place(row, item.source, item.size_px), next(answers))
                row += 1
            tell(row, len(sources))
    return faults


def _read(task: Task, sources: Sequence[Source]) -> list[_Read]:
    return [_read_one(task, source) for source in sources]


def _read_one(task: Task, source: Source) -> _Read:
    asked = task.preprocessing
    try:
        copy = work_on(read_image(source), asked.channels, asked.size_px)
    except DecodeError as error:
        return _Read(source, None, fault=error)
    return _Read(source, squash(copy.pixels, asked.size_px), copy.size_px, copy.spacing_mm)


def _batch(items: Sequence[_Read]) -> Batch:
    return Batch(
        torch.stack([item.image for item in items if item.image is not None]),
        None,
        tuple(item.source.sample_id for item in items),
        (None,) * len(items),
        tuple(item.size_px for item in items),
        spacing_mm=tuple(item.spacing_mm for item in items),
    )


def _refuse_failures(
    config: PredictConfig, faults: Mapping[str, DecodeError], reasons: Mapping[str, int], count: int
) -> None:
    allowed = failures_allowed(config.max_failures, count)
    if faults and (len(faults) > allowed or len(faults) == count):
        told = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
        first = next(iter(faults.values())).message
        raise QuarantineError(
            f"{len(faults)} of {count} images cannot be read ({told}), max_failures allows {allowed}; first: {first}",
            hint="nothing was kept; mend the images, or --set max_failures=...",
        )


def _write_texts(folder: Path, facts: Mapping[str, Any], notes: str, faults: Mapping[str, DecodeError]) -> None:
    if faults:
        lines = _quarantined(faults)
        (folder / QUARANTINE).write_text("".join(lines), encoding="utf-8")
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / NOTE).write_text(_note(facts, notes), encoding="utf-8")


def _quarantined(faults: Mapping[str, DecodeError]) -> Iterator[str]:
    for sample_id, fault in faults.items():
        told = {"sample_id": sample_id, "reason": fault.reason, "message": fault.message}
        yield json.dumps(told, ensure_ascii=False) + "\n"


def _note(facts: Mapping[str, Any], notes: str) -> str:
    model, images, seen = facts["model"], facts["images"], facts["preprocessing"]
    out = [f"{count:,} {as_text(reason)}" for reason, count in {**facts["quarantined"], **facts["left_out"]}.items()]
    told = f"{', '.join(out)}" if out else "nothing"
    told += f"; `{QUARANTINE}` names those that cannot be read" if facts["quarantined"] else ""
    return f"""# Predictions of a model

**{NOT_FOR_DIAGNOSIS}**

Made by software for {images["predicted"]:,} of {images["found"]:,} images; nobody has checked them. A model answers for
every image, also for one of a kind that it was never trained on.

## What is where

{notes}

## Where it comes from

Model `sha256:{model["artifact_id"]}`, task `{model["task"]}`, by {model["tool"]}. Each image was squashed to \
{seen["size_px"]} x {seen["size_px"]} px with {seen["channels"]} channel{"s" if seen["channels"] > 1 else ""}; answers \
are in the frame of the image as it was read. `{PROVENANCE}` holds all this for programs.

Left out: {told}.
"""
