"""`export`: an encoder or a model in a form that others load, loaded back and compared before it appears.

The folder is made aside and renamed in last: a kill leaves nothing that looks whole, and the same command begins anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.aside import made_aside, refuse_taken
from pipelines.exporters import EXPORTERS
from shared.artifact import full_disk_is_named, refuse_without_room, write_atomic
from shared.errors import DriftError

_TEXTS_BYTES = 1 << 20
"""Room for everything beside the weights."""


@dataclass(frozen=True)
class Exported:
    """What was made.

    Attributes:
        path: The folder.
        to: Name of the exporter.
        kind: Of the artifact.
        artifact_id: Of the artifact.
        files: Their names.
        compared: One `pipelines.exportable.Difference` an output, as plain data.
        lines: The same for people.
        missing: What the model card could not tell, or None.
    """

    path: Path
    to: str
    kind: str
    artifact_id: str
    files: tuple[str, ...]
    compared: tuple[dict[str, Any], ...]
    lines: tuple[str, ...]
    missing: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "path": self.path.as_posix()}


def export(reference: str, *, to: str, out: Path, regions: Path | None = None) -> Exported:
    """Write an export of a published encoder or model, load it back, compare, and let it appear.

    Args:
        reference: ``PATH[@sha256:...]``.
        to: A name of `pipelines.exporters.EXPORTERS`.
        out: Folder; absent or empty.
        regions: The encoder's region store, where it is not beside it: the model card names its prompts.

    Raises:
        ConfigError: An exporter that is not there.
        UsageError: ``out`` is a file or not empty; or what this exporter cannot write.
        InputMissingError, IncompatibleError, LockedError: No artifact, or none that can be exported.
        CorruptError: The artifact is not what was published.
        DriftError: Loaded back, the export gives other outputs; it was thrown away.
        DiskFullError: No room.
    """
    write = EXPORTERS.load(to)
    refuse_taken(out)
    from pipelines.exportable import open_exportable
    from pipelines.lineage import trace
    from pipelines.model_card import FILE, LITE_TERMS, model_card, packaged_terms, uses_lite

    source = open_exportable(reference)
    lineage = trace(source.path, source.card, regions)
    weights = sum(value.numel() * value.element_size() for value in source.model.state_dict().values())
    with made_aside(out) as folder:
        refuse_without_room(folder, weights + _TEXTS_BYTES, "the export")
        with full_disk_is_named(folder, weights):
            differences = write(source, folder)
        for item in differences:
            if not item.accepted:
                raise DriftError(
                    f"--to {to}: loaded back, {item.output} differs by {item.largest:.3g}, allowed {item.allowed:.3g}",
                    hint="nothing was kept; mwm doctor shows the versions of what wrote and read it",
                )
        write_atomic(folder / FILE, model_card(source, lineage, to, out.name, differences).encode())
        if uses_lite(lineage):
            write_atomic(folder / LITE_TERMS, packaged_terms().read_bytes())
        files = tuple(sorted(path.name for path in folder.iterdir()))
    return Exported(
        out,
        to,
        source.card.identity.kind,
        source.card.artifact_id,
        files,
        tuple(asdict(item) for item in differences),
        tuple(map(str, differences)),
        lineage.missing,
    )
