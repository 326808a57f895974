"""`export` of a region store: maps in a form that others open, read back and compared before the folder appears."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.aside import made_aside, refuse_taken
from pipelines.exporters import STORE_EXPORTERS
from pipelines.markdown import as_text
from shared.artifact import NOT_FOR_DIAGNOSIS, full_disk_is_named, refuse_without_room
from shared.config import load
from shared.errors import UsageError

NOTE = "README.md"
PROVENANCE = "export.json"
LEFT_OUT = "left_out.csv"
FORMAT_VERSION = 1
_TEXTS_BYTES = 1 << 20


@dataclass(frozen=True)
class ExportedRegions:
    """What was made.

    Attributes:
        path: The folder.
        to: Name of the exporter.
        artifact_id: Of the store.
        samples: Of the store that have maps.
        files: Names at the top of the folder.
        compared: One ``{what, count}`` a kind of thing that was read back and found equal.
        lines: The same for people.
        left_out: Reason -> how many samples (or volumes) are not in it.
    """

    path: Path
    to: str
    artifact_id: str
    samples: int
    files: tuple[str, ...]
    compared: tuple[dict[str, Any], ...]
    lines: tuple[str, ...]
    left_out: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "kind": "region-store", "path": self.path.as_posix()}


def export_regions(
    reference: str, *, to: str, out: Path, images: Path | None = None, settings: Sequence[str] = ()
) -> ExportedRegions:
    """Write an export of a published region store, read it back, compare, and let it appear.

    Args:
        reference: ``PATH[@sha256:...]``.
        to: A name of `pipelines.exporters.STORE_EXPORTERS`.
        out: Folder; absent or empty.
        images: What the store was made from, for formats that need it.
        settings: ``key=value`` of the exporter's options.

    Raises:
        ConfigError: An exporter or a setting that is not there.
        UsageError: ``out`` is a file or not empty; no maps; images that are needed and not given.
        InputMissingError, IncompatibleError, LockedError: No store, or images that lack a sample.
        CorruptError: The store or an image is not what was published.
        DriftError: Read back, a file is something else; all was thrown away.
        DiskFullError: No room.
    """
    kind = STORE_EXPORTERS.load(to)
    options = load(kind.Options, {}, settings)
    refuse_taken(out)
    if kind.needs_images and images is None:
        raise UsageError(f"--to {to} needs --images", hint="the folder or list that the store was made from")
    from pipelines.exportable_store import make_durable, open_exportable_store

    source = open_exportable_store(reference, images)
    exporter = kind(options)
    with made_aside(out) as folder:
        refuse_without_room(folder, _TEXTS_BYTES, "the export")
        with full_disk_is_named(folder, _TEXTS_BYTES):
            compared = exporter.write(source, folder)
            left_out = Counter(source.left_out.values())
            if left_out:
                with (folder / LEFT_OUT).open("w", newline="", encoding="utf-8") as file:
                    rows = sorted(source.left_out.items())
                    csv.writer(file, lineterminator="\n").writerows([("sample_id", "reason"), *rows])
            facts = _facts(source, to, options, compared, left_out)
            text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
            (folder / PROVENANCE).write_text(text, encoding="utf-8")
            (folder / NOTE).write_text(_note(source, to, exporter, facts, compared), encoding="utf-8")
            make_durable(folder)
        files = tuple(sorted(path.name for path in folder.iterdir()))
    return ExportedRegions(
        out,
        to,
        source.store.card.artifact_id,
        len(source.samples),
        files,
        tuple(asdict(item) for item in compared),
        tuple(map(str, compared)),
        dict(left_out),
    )


def _facts(source: Any, to: str, options: Any, compared: Sequence[Any], left_out: Mapping[str, int]) -> dict[str, Any]:
    """What ``export.json`` says: where the files come from, and how they were made."""
    card = source.store.card
    spec = card.identity.spec
    return {
        "format": f"mwm-export-{to}",
        "format_version": FORMAT_VERSION,
        "notice": NOT_FOR_DIAGNOSIS,
        "artifact": {"kind": "region-store", "artifact_id": card.artifact_id, "tool": card.provenance.tool},
        "settings": options.model_dump(mode="json"),
        "regions": [
            {"name": name, "texts": texts} for name, texts in zip(source.regions, _prompts(source), strict=True)
        ],
        "grounder": (spec.get("grounder") or {}).get("name"),
        "segmenter": (spec.get("segmenter") or {}).get("name"),
        "samples": {"in_store": len(source.store), "with_maps": len(source.samples)},
        "left_out": dict(left_out),
        "compared": [asdict(item) for item in compared],
    }


def _prompts(source: Any) -> list[list[str]]:
    said = {item["name"]: list(item["texts"]) for item in source.store.card.identity.spec.get("regions", ())}
    return [said.get(name, []) for name in source.regions]


def _note(source: Any, to: str, exporter: Any, facts: Mapping[str, Any], compared: Sequence[Any]) -> str:
    prompts = "\n".join(
        f"- **{as_text(item['name'])}**: {', '.join(map(as_text, item['texts'])) or 'no words known'}"
        for item in facts["regions"]
    )
    out = ", ".join(f"{count:,} {as_text(reason)}" for reason, count in facts["left_out"].items())
    lines = yaml.safe_dump(facts["settings"], sort_keys=False).strip()
    return f"""# Region maps as {to}

**{NOT_FOR_DIAGNOSIS}**

Found by software for words, in {facts["samples"]["with_maps"]:,} images; nobody has checked them one by one.

## What is where

{exporter.notes(source)}

## Where it comes from

Region store `sha256:{facts["artifact"]["artifact_id"]}`, grounder `{facts["grounder"]}`, segmenter \
`{facts["segmenter"]}`, from these words:

{prompts}

Left out: {f"{out}; `{LEFT_OUT}` names them" if out else "nothing"}. `{PROVENANCE}` holds all this for programs.

## Settings

```yaml
{lines}
```

## How it was checked

Read back and compared with the store before this folder appeared: {"; ".join(map(str, compared))}.

The terms of the images, and of the weights that found the regions, decide what may be done with this.
"""
