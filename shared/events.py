"""Event files for TensorBoard, written in place: no thread, no queue, nothing lost but the record a kill cuts off."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

FOLDER = "run/tb"


class Events:
    """The event files of one folder; opened again it adds a file, and readers join them.

    Args:
        folder: Created with the first event.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder = folder
        self._event, self._session = event_pb2.Event, event_pb2.SessionLog
        self._summary, self._records = summary_pb2.Summary, RecordWriter
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def rewind(self, step: int) -> None:
        """Take back what earlier files say past a step: it comes again."""
        if self._folder.is_dir() and any(self._folder.glob("events.*")):
            self._write(step=step + 1, session_log=self._session(status=self._session.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the line of each name."""
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=v) for name, v in values.items()])
        self._write(step=step, summary=summary)

    def picture(self, step: int, name: str, png: bytes, height: int, width: int) -> None:
        """Add a picture, in RGB."""
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """End the file; a later event begins another."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, **content: Any) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Readers go by the order of names; a host's name, as TensorBoard would add, is nobody's business.
            count = sum(1 for _ in self._folder.glob("events.*"))
            self._file = (self._folder / f"events.out.tfevents.{count + 1:06d}").open("xb")
            self._writer = self._records(self._file)
            self._writer.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
