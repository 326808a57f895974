"""`audit`: are artifacts what was published, and does every witnessed mask draw again to the bit?

Levels: ``integrity`` (cards, ids, files, Merkle roots, and a model's scores from its predictions; runs no model)
and ``masks`` (integrity, and every witness of an encoder redrawn from its region store and card). ``all`` is
everything this release can do.

Verdicts: ``corrupt`` and ``missing`` are about bytes (exit 4); ``drift`` is a number or a mask that, computed again
from sound bytes, differs from the record (exit 3); ``unrecomputable`` is what this release cannot judge (exit 5 only
where that is all there is).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.audit_maps import MAP_VERDICTS, Again, MapsAudit, audit_maps
from pipelines.audit_outputs import compare_outputs
from shared.artifact import (
    CARD,
    Card,
    Input,
    find_beside,
    publish,
    read_card,
    verify,
    write_atomic,
)
from shared.config import digest
from shared.errors import CorruptError, IncompatibleError, InputMissingError, UsageError
from shared.lease import Lease
from shared.workspace import RESOLVED, SPEC, begin

Verdict = Literal["identical", "tolerant", "drift", "missing", "corrupt", "unrecomputable"]
MAPS = "maps made again"
LEVELS = ("integrity", "masks", "maps", "all")


@dataclass(frozen=True)
class Row:
    """One verdict: which artifact, what was checked, how many of it, and the outcome."""

    artifact: str
    kind: str
    check: str
    checked: int
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class AuditResult:
    """All verdicts of an audit, and what level ``maps`` found, by artifact."""

    rows: tuple[Row, ...]
    maps: tuple[tuple[str, MapsAudit], ...] = ()
    refused: bool = False
    """Of a store whose maps were asked for, none could be made again."""

    @property
    def exit_code(self) -> int:
        """4 corrupt or missing, 3 drift, 5 when nothing could be recomputed, else 0."""
        verdicts = {row.verdict for row in self.rows}
        if verdicts & {"corrupt", "missing"}:
            return 4
        if "drift" in verdicts:
            return 3
        nothing_made = any(not found.judged for _, found in self.maps) or self.refused
        return 5 if nothing_made or verdicts == {"unrecomputable"} else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        told: dict[str, Any] = {"exit_code": self.exit_code, "rows": [asdict(row) for row in self.rows]}
        if self.maps:
            told["maps"] = {name: found.as_dict() for name, found in self.maps}
        return told

    def lines(self) -> list[str]:
        """One line a verdict, then the sum."""
        width = max((len(row.artifact) for row in self.rows), default=0)
        lines = [
            f"{row.verdict:<14} {row.artifact:<{width}}  {row.check}: {row.checked} checked"
            + (f"; {row.detail}" if row.detail else "")
            for row in self.rows
        ]
        sums = Counter(row.verdict for row in self.rows)
        return [*lines, "audit: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(sums.items()))]


def audit(
    path: Path,
    *,
    level: str = "integrity",
    regions: Path | None = None,
    out: Path | None = None,
    command: str = "",
    again: Again | None = None,
) -> AuditResult:
    """Audit an artifact, or every artifact below a folder.

    Args:
        path: An artifact's folder, or a folder that holds artifacts (a chain's).
        level: One of `LEVELS`.
        regions: Region store for redrawing an encoder's masks, where it is neither below ``path`` nor beside it.
        out: If given, the audit is published there as an artifact of kind ``audit-report``.
        command: Command line for provenance.
        again: How level ``maps`` makes rows again; level ``all`` makes them only if it is given.

    Returns:
        Verdicts; corrupt artifacts are verdicts, not exceptions.

    Raises:
        UsageError: Unknown level, or level ``maps`` without the images.
        InputMissingError, IncompatibleError: No artifact at ``path``.
    """
    if level not in LEVELS:
        raise UsageError(f"--level {level}: unknown", hint=f"known: {', '.join(LEVELS)}")
    if level == "maps" and again is None:
        raise UsageError("--level maps: needs the images that were localized", hint="--images FOLDER_OR_LIST")
    folders = _artifacts_below(path, out)
    cards: dict[Path, Card] = {}
    rows: list[Row] = []
    for folder in folders:
        rows.extend(_integrity(folder, _name(folder, path), cards))
    rows.extend(_absent(path, cards))
    if level in ("masks", "all"):
        stores = {card.artifact_id: folder for folder, card in cards.items() if card.identity.kind == "region-store"}
        if regions is None and not stores:
            regions = next(filter(None, (_store_beside(folder, card) for folder, card in cards.items())), None)
        if regions is not None:
            if regions.resolve() not in {folder.resolve() for folder in stores.values()}:
                read_card(regions, "region-store")
                rows.extend(_integrity(regions, regions.name, {}))  # masks drawn from a damaged store prove nothing
            stores[read_card(regions, "region-store").artifact_id] = regions
        for folder, card in cards.items():
            if card.identity.kind == "encoder":
                rows.append(_masks(folder, card, _name(folder, path), stores))
    found: list[tuple[str, MapsAudit]] = []
    if level in ("maps", "all"):
        for folder, card in cards.items():
            if card.identity.kind == "region-store":
                told, maps = _maps(folder, _name(folder, path), again)
                rows += told
                found += [] if maps is None else [(_name(folder, path), maps)]
    if level == "maps" and not found and not any(row.kind == "region-store" for row in rows):
        raise UsageError(f"{path}: no region store in it, so no maps to make again")
    refused = again is not None and any(row.check == MAPS and row.checked == 0 for row in rows)
    result = AuditResult(tuple(rows), tuple(found), refused)
    if out is not None:
        _publish(result, out, level, cards.values(), command)
    return result


def _store_beside(folder: Path, card: Card) -> Path | None:
    wanted = (item.artifact_id for item in card.identity.inputs if item.kind == "region-store")
    return next((found for item in wanted if (found := find_beside(folder, item)) is not None), None)


def _artifacts_below(path: Path, out: Path | None) -> list[Path]:
    if not path.is_dir():
        raise InputMissingError(f"{path}: no such folder")
    if (path / CARD).is_file():
        return [path, *(card.parent for card in sorted(path.glob(f"*/{CARD}")))]
    if (path / SPEC).is_file() or (path / RESOLVED).is_file():
        read_card(path)  # a run without its card is no folder of artifacts: say so
    found = [card.parent for card in sorted(path.rglob(CARD)) if not _in_run_of_artifact(card.parent, path)]
    # An audit does not audit its own report: it would never be the same twice.
    found = [folder for folder in found if out is None or folder.resolve() != out.resolve()]
    if not found:
        read_card(path)  # says whether it is unpublished or under a live lease
    return found


def _in_run_of_artifact(folder: Path, root: Path) -> bool:
    """Whether a folder lies below the ``run/`` of an artifact or of a run, which is not audited."""
    inside = (place for place in [folder, *folder.parents] if place != root and root in place.parents)
    owners = (place.parent for place in inside if place.name == "run")
    return any((owner / CARD).is_file() or (owner / SPEC).is_file() for owner in owners)


def _name(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root).as_posix()
    return root.name if relative == "." else relative


def _integrity(folder: Path, name: str, cards: dict[Path, Card]) -> list[Row]:
    try:
        card = read_card(folder)
    except IncompatibleError as error:
        return [Row(name, "unknown", "card", 1, "unrecomputable", error.message)]
    except CorruptError as error:
        return [Row(name, "unknown", "card", 1, "corrupt", error.message)]
    cards[folder] = card
    kind = card.identity.kind
    findings = verify(folder, card) or compare_outputs(folder, card)
    rows = [_row(name, kind, "files", len(card.provenance.files) + 1, findings)]
    if kind == "region-store":
        from shared.region_verify import verify_store

        count = card.identity.outputs.get("samples")
        rows.append(_row(name, kind, "maps", count if isinstance(count, int) else 0, verify_store(folder, card)))
    if kind in ("model", "study") and not findings:
        rows.append(_scores(folder, card, name))
    return rows


def _scores(folder: Path, card: Card, name: str) -> Row:
    """A model's metrics against its predictions: no id covers them, so a new seal on the card would hide a change.

    A study's numbers and sentences, against the predictions of its runs.
    """
    kind, outputs = card.identity.kind, card.identity.outputs
    try:
        if kind == "study":
            from pipelines.study_summary import recompute

            found, count = recompute(folder, card), int(outputs.get("runs", 0))
        else:
            from stage3_finetune.rescore import rescore

            found, count = rescore(folder, card), int(outputs.get("test", 0)) + int(outputs.get("val", 0))
    except IncompatibleError as error:
        return Row(name, kind, "scores", 0, "unrecomputable", error.message)
    except CorruptError as error:
        return Row(name, kind, "scores", 0, "corrupt", error.message)
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return Row(name, kind, "scores", count, "drift" if found else "identical", "; ".join(found[:5]) + more)


def _absent(path: Path, cards: dict[Path, Card]) -> Iterator[Row]:
    """Runs below a folder that have lost their card, or never got one."""
    runs = {spec.parents[1] for spec in path.rglob(SPEC)} | {kept.parent for kept in path.rglob(RESOLVED)}
    for folder in sorted(runs):
        if folder not in cards and not (folder / CARD).exists() and not _expected(folder):
            yield Row(_name(folder, path), "unknown", "card", 1, "missing", f"a run without {CARD}")


def _expected(folder: Path) -> bool:
    """Whether a run may lack its card: kept aside by ``--fresh``, or an audit that is being made."""
    try:
        kind = json.loads((folder / SPEC).read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = None
    return ".old-" in folder.name or kind == "audit-report"


def _row(name: str, kind: str, check: str, checked: int, findings: list[Any]) -> Row:
    if not findings:
        return Row(name, kind, check, checked, "identical")
    verdict: Verdict = "missing" if all(item.problem == "missing" for item in findings) else "corrupt"
    shown = "; ".join(f"{item.file}: {item.problem}" for item in findings[:5])
    more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
    return Row(name, kind, check, checked, verdict, shown + more)


def _masks(folder: Path, card: Card, name: str, stores: dict[str, Path]) -> Row:
    wanted = next((item.artifact_id for item in card.identity.inputs if item.kind == "region-store"), None)
    if wanted is None or wanted not in stores:
        return Row(name, "encoder", "masks", 0, "unrecomputable", "its region store is not at hand (--regions)")
    from shared.regions import open_region_store
    from stage2_pretrain.witness import redraw

    try:
        found = redraw(open_region_store(stores[wanted]), card.identity.spec, folder)
    except CorruptError as error:
        return Row(name, "encoder", "masks", 0, "corrupt", error.message)
    except IncompatibleError as error:
        return Row(name, "encoder", "masks", 0, "unrecomputable", error.message)
    if found.mismatches:
        return Row(name, "encoder", "masks", found.checked, "drift", "; ".join(found.mismatches[:5]))
    detail = f"{found.draws} draws in {found.epochs} epochs agree with the recorded sums"
    if found.unrecomputable:
        detail = (
            f"{found.draws} draws agree with the recorded scores of a network; of {found.unrecomputable} others no "
            "scores were kept, and they cannot be drawn again"
        )
    return Row(name, "encoder", "masks", found.checked, "identical", detail)


def _maps(folder: Path, name: str, again: Again | None) -> tuple[list[Row], MapsAudit | None]:
    """Verdicts of level ``maps`` on one store: a row a kind of verdict, and one for the prompts."""
    kind, check = "region-store", MAPS
    if again is None:
        return [Row(name, kind, check, 0, "unrecomputable", "left out: needs the images (--images)")], None
    from shared.regions import open_region_store

    try:
        found = audit_maps(open_region_store(folder), again)
    except CorruptError as error:
        return [Row(name, kind, check, 0, "corrupt", error.message)], None
    except (IncompatibleError, InputMissingError) as error:
        hint = f" ({error.hint})" if error.hint else ""
        return [Row(name, kind, check, 0, "unrecomputable", error.message + hint)], None
    rows = []
    for verdict in MAP_VERDICTS:
        those = [row for row in found.rows if row.verdict == verdict]
        if those:
            rows.append(Row(name, kind, check, len(those), verdict, found.told(verdict)))
    control = found.control
    rows.append(Row(name, kind, "unrelated prompts", control.samples, control.verdict, control.detail))
    return rows, found


def _publish(result: AuditResult, out: Path, level: str, cards: Iterable[Card], command: str) -> None:
    from shared.report import audit_report

    inputs = sorted(
        (Input(role="audited", kind=card.identity.kind, artifact_id=card.artifact_id) for card in cards),
        key=lambda item: (item.kind, item.artifact_id),
    )
    # The verdicts are in the specification: another audit of the same artifacts is never "already done".
    spec = {"level": level, "verdicts": digest(result.as_dict()), "version": 1}
    with Lease(out):
        status, _ = begin(
            out, kind="audit-report", inputs=inputs, spec=spec, resolved=f"level: {level}\n", has_fresh=False
        )
        if status == "done":
            return
        page = audit_report(result.as_dict()["rows"], [found.section(name) for name, found in result.maps])
        write_atomic(out / "report.html", page.encode())
        if result.maps:
            write_atomic(out / "maps.json", json.dumps(result.as_dict()["maps"], indent=1).encode())
        publish(
            out,
            kind="audit-report",
            inputs=inputs,
            spec=spec,
            outputs={"exit_code": result.exit_code, "rows": result.as_dict()["rows"]},
            command=command,
        )
