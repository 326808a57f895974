"""``--dry-run``: what a command would do and cost. Nothing is written, but for a corpus that a recipe brings itself.

That one (the tour's slices) is made in a temporary folder and removed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from jaxtyping import UInt8
from pydantic import BaseModel

from pipelines.options import print_json
from shared.config import digest, dump_yaml
from shared.forecast import Forecast, kept_aside, refuse_unusable, size
from shared.merkle import row_digest
from shared.pseudonyms import unsalted
from shared.region_layout import SampleRow
from shared.runlog import duration

if TYPE_CHECKING:
    from pipelines.chain import ChainConfig
    from stage1_localize.rehearse import Rehearsed
    from stage3_finetune.config import FinetuneConfig


def tell(config: BaseModel, forecasts: Mapping[str, Forecast], as_json: bool) -> None:
    """Print the resolved settings on stdout and the forecasts on stderr; or all as one JSON object."""
    whole = {
        "seconds": sum(item.seconds for item in forecasts.values()),
        "disk_bytes": sum(item.disk_bytes for item in forecasts.values()),
        "memory_bytes": max(item.memory_bytes for item in forecasts.values()),
    }
    if as_json:
        print_json(
            {
                "dry_run": True,
                "settings": config.model_dump(mode="json"),
                "settings_sha256": digest(config),
                **({"whole": whole} if len(forecasts) > 1 else {}),
                "forecast": {name: item.as_dict() for name, item in forecasts.items()},
            }
        )
        return
    typer.echo(dump_yaml(config), nl=False)
    for name, item in forecasts.items():
        for line in item.lines():
            warning = line.startswith("warning: ")
            prefix = f"{name}: " if len(forecasts) > 1 else ""
            typer.echo(f"warning: {prefix}{line[9:]}" if warning else f"{prefix}{line}", err=True)
    if len(forecasts) > 1:
        typer.echo(
            f"whole: about {duration(whole['seconds'])}, {size(whole['disk_bytes'])} of disk, "
            f"{size(whole['memory_bytes'])} of memory",
            err=True,
        )
    typer.echo(f"settings sha256:{digest(config)[:16]}; dry run, nothing written", err=True)


@unsalted()
def rehearse_chain(
    config: ChainConfig, *, out: Path, images: Path | None, labels: Path | None, fresh: bool
) -> dict[str, Forecast]:
    """Forecast every step of a recipe; what is not made yet is stood in for by what the step before just tried."""
    from pipelines.chain import check_given
    from stage1_localize.rehearse import rehearse as rehearse_localize

    check_given(config, images, labels)
    refuse_unusable(out)
    anew = kept_aside(out, fresh)
    with _corpus(config, out, images, labels, anew) as (images, labels):
        first = rehearse_localize(config.localize, images=images, out=out / "regions", fresh=anew)
        forecasts = {"localize": first.forecast}
        if config.pretrain is not None:
            forecasts["pretrain"] = _pretrain(config, first, images, out, anew)
        if config.finetune is not None and labels is not None:
            made = "pretrain" in forecasts and forecasts["pretrain"].standing == "done"
            forecasts |= _finetune(config, config.finetune, images, labels, out, anew, made)
    return forecasts


def _pretrain(config: ChainConfig, first: Rehearsed, images: Path, out: Path, fresh: bool) -> Forecast:
    from shared.regions import open_region_store
    from stage2_pretrain.rehearse import rehearse

    assert config.pretrain is not None
    if first.forecast.standing == "done":
        store: Any = open_region_store(out / "regions")
        return rehearse(config.pretrain, images=images, store=store, out=out / "encoder", fresh=fresh)[0]
    stand_in: Any = StandIn(first)
    return rehearse(config.pretrain, images=images, store=stand_in, out=out / "encoder", count=first.count)[0]


def _finetune(
    chain: ChainConfig, config: FinetuneConfig, images: Path, labels: Path, out: Path, fresh: bool, made: bool
) -> dict[str, Forecast]:
    from shared.backbones import resolve_options
    from stage3_finetune.rehearse import rehearse

    found = {}
    if chain.pretrain is not None:
        planned = config.model_copy(
            update={
                "backbone": chain.pretrain.backbone,
                "backbone_options": resolve_options(chain.pretrain.backbone, chain.pretrain.backbone_options),
                "channels": chain.pretrain.channels,
            }
        )
        found["finetuned"], _ = rehearse(
            config if made else planned.model_copy(update={"freeze": False}),
            images=images,
            labels=labels,
            encoder=str(out / "encoder") if made else None,
            out=out / "finetuned",
            fresh=fresh,
            planned=not made,
        )
    if chain.from_scratch or not found:
        found["scratch"], _ = rehearse(
            config, images=images, labels=labels, encoder=None, out=out / "scratch", fresh=fresh
        )
    return found


@contextmanager
def _corpus(
    config: ChainConfig, out: Path, images: Path | None, labels: Path | None, fresh: bool
) -> Iterator[tuple[Path, Path | None]]:
    if config.corpus != "template":
        assert images is not None
        yield images, labels
    elif (out / "labels.csv").is_file() and not fresh:
        yield out / "images", out / "labels.csv"
    else:
        from pipelines.tour_corpus import write_tour_corpus

        with tempfile.TemporaryDirectory(prefix="mwm-dry-run-") as folder:
            yield write_tour_corpus(Path(folder))


class StandIn:
    """The images just tried, in the shape of a region store."""

    def __init__(self, tried: Rehearsed) -> None:
        self.regions = tuple(tried.config.regions)
        self.grounder = tried.config.grounder.name
        self.grid = (tried.config.grid_px, tried.config.grid_px)
        names = sorted(tried.maps)
        self._maps = np.stack([tried.maps[name] for name in names])
        self.samples = [
            SampleRow(
                row=row,
                sample_id=name,
                status="ok",
                source_sha256=tried.images[name].source_sha256,
                pixel_sha256=tried.images[name].pixel_sha256,
                frame={},
                shape=tried.images[name].pixels.shape,
                spacing_mm=None,
                group=None,
                maps_digest=row_digest(tried.maps[name]).hex(),
                detections_digest="",
            )
            for row, name in enumerate(names)
        ]

    def maps(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n K s s"]:
        """As `shared.regions.RegionStore.maps`."""
        return self._maps[list(rows)]
