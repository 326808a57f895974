"""What a run says: lines on stderr and in files of `run/`: the log, metrics, timings, and `tb` for TensorBoard.

Files never hold an absolute path: they are shown to others, and folders above a run are nobody's business.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

from shared.artifact import write_atomic
from shared.errors import InterruptedRun
from shared.events import FOLDER, Events

METRICS = "run/metrics.jsonl"
TIMINGS = "run/timings.jsonl"
"""What differs each time that a run is done; metrics are the same again."""

LOG = "run/run.log"

_ROOT = Path(__file__).resolve().parent.parent.as_posix() + "/"
_APOSTROPHE = r"(?<=\w)'(?=\w)"
_ABSOLUTE = re.compile(rf"""(?<![\w.~<>-])/(?=[^\s/])(?:[^'":\n]|:(?!\s)|{_APOSTROPHE})*/""")
"""Folders are named after patients, with spaces and commas: to the last slash before a colon, quote or end of line."""
_QUOTED = re.compile(
    r"""(?P<quote>['"])/(?:(?!(?P=quote)(?!\w)).)*/(?P<name>(?:(?!(?P=quote)(?!\w))[^/\n])*)(?P=quote)"""
)
_STOPS = (KeyboardInterrupt, InterruptedRun)


class RunLog:
    """The log of one run folder, as a context manager; opened again it appends.

    Args:
        out: The run's folder; ``run/`` is created in it.
        stream: Where people read, by default stderr.
        interval_s: Seconds between plain progress lines when ``stream`` is no terminal.

    Attributes:
        warnings: Every warning of this process, in order, for the report.
    """

    def __init__(self, out: Path, *, stream: TextIO | None = None, interval_s: float = 30.0) -> None:
        self.out = out
        self.warnings: list[str] = []
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._log: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._events: dict[str, Events] | None = {}
        self._marks: tuple[str, ...] = ()
        self._bar: Any = None
        self._started: tuple[str, int, float] | None = None
        self._shown_at = -math.inf

    def __enter__(self) -> RunLog:
        (self.out / "run").mkdir(parents=True, exist_ok=True)
        self._log = (self.out / LOG).open("a", encoding="utf-8")
        self._mend_metrics()
        self._open_metrics()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()
        with suppress(OSError):  # a full disk must not stand before the error that tells of it
            if kind is not None and not issubclass(kind, _STOPS):
                self._write("error", "".join(traceback.format_exception(kind, error, trace)).rstrip())
            elif kind is not None:
                self._write("info", f"stopped: {str(error) or kind.__name__}")
        for file in (self._log, self._metrics):
            if file is not None:
                with suppress(OSError) if error is not None else nullcontext():
                    file.close()
        self._log = self._metrics = None
        for events in (self._events or {}).values():
            events.close()

    def info(self, text: str) -> None:
        """Say one line."""
        self._say("info", text, text)

    def warn(self, text: str) -> None:
        """Say one line that the reader should act upon; also kept in `warnings`."""
        self.warnings.append(scrub(text))
        self._say("warning", text, f"warning: {text}")

    def progress(self, done: int, total: int, unit: str, **values: float | str) -> None:
        """Show how far the run is: a live line on a terminal, else one plain line every `interval_s` seconds.

        Args:
            done: Units finished, counted from the beginning of the whole run (a resumed run starts above 0).
            total: Units of the whole run.
            unit: Singular noun, e.g. ``"step"``.
            values: Shown as ``name value``; a name that ends in ``_per_s`` as ``value name/s``.
        """
        now = time.monotonic()
        if self._started is None or self._started[0] != unit or done < self._started[1]:
            self._started, self._shown_at = (unit, done, now), -math.inf
        _, first, since = self._started
        parts = [f"{unit} {done}/{total}", *(_shown(name, value) for name, value in values.items())]
        if done > first and done < total:
            parts.append(f"eta {duration((now - since) / (done - first) * (total - done))}")
        line = " ".join(parts)
        rates = {name: float(value) for name, value in values.items() if name.endswith("_per_s")}
        if rates and self._events and "" in self._events:
            self._events[""].scalars(done, rates)
        if self._stream.isatty():
            self._draw(done, total, line)
            if done >= total:
                self._end_bar()
        elif done >= total or now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._say("progress", line, line)
        if done >= total:
            self._started = None

    def metric(self, step: int, **values: Any) -> None:
        """Append one line to ``run/metrics.jsonl``, and its numbers to TensorBoard's files.

        Args:
            step: Step that the values belong to; what `rewind` goes by.
            values: JSON values. Floats that are not finite become null.
        """
        if self._metrics is None:
            raise RuntimeError("RunLog.metric outside its 'with' block")
        row = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self._plot(step, row)

    def timing(self, step: int, **values: Any) -> None:
        """Append one line to ``run/timings.jsonl``, and its numbers to TensorBoard's files.

        Args:
            step: Step that the values belong to; of two lines with one step the later one is read.
            values: JSON values that are finite.
        """
        row = {"step": step, **values}
        with (self.out / TIMINGS).open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")  # by a kill in the middle of a line
            file.write(("\n" * torn + json.dumps(row) + "\n").encode())
        self._plot(step, {name: value for name, value in row.items() if name != "epoch"})

    def _plot(self, step: int, row: Mapping[str, Any]) -> None:
        kept = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        where = {name: kept.pop(name) for name in self._marks if name in kept}
        if (events := self._board(where)) is not None:
            events.scalars(step, kept)

    def sync(self) -> None:
        """Make the metrics durable: called before a state is saved, so that a resumed run has the rows before it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def picture(self, step: int, name: str, pixels: Callable[[], Any]) -> None:
        """Show a picture in TensorBoard.

        Args:
            step: Step that it belongs to.
            name: Of the series that it belongs to; never a sample's.
            pixels: Makes it, uint8 [H, W, 3]; called only if it will be shown.
        """
        if (events := self._board({})) is not None:
            from shared.figures import png

            made = pixels()
            events.picture(step, name, png(made), *made.shape[:2])

    def rewind(self, step: int, **where: Any) -> int:
        """Drop metrics past a step: a resumed run writes them again.

        Args:
            step: Last step to keep.
            where: Only rows with these values are dropped, e.g. ``fold=2``.

        Returns:
            Number of lines dropped.
        """
        rows = read_metrics(self.out)
        kept = [row for row in rows if row["step"] <= step or any(row.get(name) != where[name] for name in where)]
        if len(kept) < len(rows):
            if self._metrics is not None:
                self._metrics.close()
            write_atomic(self.out / METRICS, _lines(kept))
            self._open_metrics()
        self._marks = tuple(where)
        if (events := self._board(where)) is not None:
            events.rewind(step)
        return len(rows) - len(kept)

    def _board(self, where: Mapping[str, Any]) -> Events | None:
        """The event files of one fit, in a folder of their own where the run has several; None without TensorBoard."""
        name = "-".join(f"{key}-{value}" for key, value in where.items())
        if self._events is not None and name not in self._events:
            try:
                self._events[name] = Events(self.out / FOLDER / name)
            except Exception as error:  # its protobuf may not fit: an optional part never stops a run
                self._events = None
                absent = isinstance(error, ModuleNotFoundError)
                why = "is not installed" if absent else f"cannot be loaded ({type(error).__name__})"
                self.info(f"TensorBoard {why}: no run/tb; pip install 'mask-what-matters[tensorboard]'")
        return None if self._events is None else self._events[name]

    def _mend_metrics(self) -> None:
        path = self.out / METRICS
        raw = path.read_bytes() if path.exists() else b""
        kept = _rows(raw)
        broken = raw.count(b"\n") - len(kept)
        # A kill in the middle of a line leaves its beginning without comment: the step will be done again.
        if broken or raw[-1:] not in (b"", b"\n"):
            write_atomic(path, _lines(kept))
        if broken:  # a power cut leaves such
            self.warn(f"{METRICS}: {broken} broken line{'s' if broken > 1 else ''} dropped")

    def _open_metrics(self) -> None:
        self._metrics = (self.out / METRICS).open("a", encoding="utf-8")

    def _say(self, level: str, text: str, shown: str) -> None:
        self._write(level, text)
        if self._bar is not None:
            self._bar.console.print(shown, markup=False, highlight=False)
        else:
            print(shown, file=self._stream, flush=True)

    def _write(self, level: str, text: str) -> None:
        if self._log is not None:
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            self._log.write(f"{stamp} {level}: {scrub(text)}\n")
            self._log.flush()

    def _draw(self, done: int, total: int, line: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bar.add_task(line, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=line)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``; empty if there is none. `RunLog` counts those that are broken."""
    path = out / METRICS
    return _rows(path.read_bytes()) if path.exists() else []


def read_timings(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``timings.jsonl`` by step, those of a part done twice as they were last."""
    path = out / TIMINGS
    rows = {row["step"]: row for row in _rows(path.read_bytes())} if path.exists() else {}
    return [rows[step] for step in sorted(rows)]


def scrub(text: str) -> str:
    """Shorten absolute paths to their last part; files of this project to their path in it.

    Where a path without quotes ends cannot be known: what follows it may go too, up to a last slash.

    >>> scrub("cannot read /data/jane/scan 1.png: broken")
    'cannot read <path>/scan 1.png: broken'
    >>> scrub("cannot read '/data/Jane Doe/MRN 1/x.png'")
    "cannot read '<path>/x.png'"
    >>> scrub("images /data/Jane Doe/MRN 1/scans: no such folder")
    'images <path>/scans: no such folder'
    """
    quoted = _QUOTED.sub(r"\g<quote><path>/\g<name>\g<quote>", text.replace(_ROOT, ""))
    return _ABSOLUTE.sub("<path>/", quoted)


def duration(seconds: float) -> str:
    """A time for people: ``42s``, ``3m05``, ``1h52``, ``2d03h``.

    >>> [duration(s) for s in (42, 185, 6720, 183600)]
    ['42s', '3m05', '1h52', '2d03h']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _shown(name: str, value: float | str) -> str:
    text = value if isinstance(value, str) else (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}")
    return f"{text} {name.removesuffix('_per_s')}/s" if name.endswith("_per_s") else f"{name} {text}"


def _rows(raw: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in raw.split(b"\n")[:-1]:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
