"""The command that applies a model to new images."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from pipelines.options import AsJson, Images, Quiet, Verbose, check_artifact, print_json, refuse_file

_SAY_S = 30.0


def predict(
    model: Annotated[str, typer.Argument(help="A model, PATH or PATH@sha256:... to pin it.")],
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder to write; absent or empty.")],
    to: Annotated[
        str | None,
        typer.Option(help="csv (classification), png, nifti or coco (segmentation), coco (detection) [the first]."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the settings; repeatable.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """A model + new images -> its answers, in the frame of each image. Not for diagnosis."""
    from pipelines.answers import WRITERS
    from pipelines.predict_config import PredictConfig
    from shared.config import load

    config = load(PredictConfig, {}, set_ or ())
    if to is not None:
        WRITERS.load(to)
    refuse_file(Path(model.partition("@sha256:")[0]))
    check_artifact(model, "model")
    from pipelines.predict import predict as run
    from shared.region_layout import QUARANTINE

    made = run(model, images=images, out=out, to=to, config=config, tell=_Teller())
    for reason, count in sorted(made.quarantined.items()):
        typer.echo(f"warning: {count} of {made.images} images quarantined: {reason}; see {QUARANTINE}", err=True)
    for reason, count in sorted(made.left_out.items()):
        typer.echo(f"warning: {count} of {made.images} images left out: {reason}", err=True)
    if as_json:
        return print_json(made.as_dict())
    typer.echo(f"made: {made.to} predictions of {made.predicted} images ({', '.join(made.files)})")
    typer.echo(f"where: {made.path}")
    typer.echo(f"digest: sha256:{made.artifact_id} (of the model)")
    typer.echo(f"skipped: {sum(made.quarantined.values())} inputs quarantined, {sum(made.left_out.values())} left out")
    typer.echo(f"next: {quote(str(made.path / 'README.md'))} says what is where. Not for diagnosis")
    return None


class _Teller:
    """One line of progress every half minute."""

    def __init__(self) -> None:
        self._since = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_S:
            self._said = now
            print(f"image {done}/{total} {done / (now - self._since):.1f} img/s", file=sys.stderr, flush=True)
