"""Ends commands of `mwm` at moments it chooses, continues them, and tells where each one was ended.

Run as a program it is a fork server: it imports what a first command had imported when it was done, and starts no
thread, so a command costs a fork and no import. The commands are real processes that run
`pipelines.cli.main`, and die of real signals.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.artifact import CARD, read_card, verify
from shared.lease import lease_holder
from tests.pipelines.conftest import Chain

FINAL = {"finalise", "card", "export", "publish"}
"""Phases after the last row or step."""

_PATIENCE_S = 600
_LONGEST_S = 20.0
"""Of a wait for a kill anywhere: a killed run goes on, so the kills of a long one are spread over all of it."""


class Command:
    """One command in one folder, started as often as it takes."""

    def __init__(self, stage: str, chain: Chain, out: Path, settings: list[str]) -> None:
        self.stage, self.out = stage, out
        given = [stage, str(chain.recipe), "--images", str(chain.images), "--out", str(out), *settings]
        if stage == "pretrain":
            given += ["--regions", str(chain.out / "regions")]
        if stage == "finetune":
            given += ["--labels", str(chain.labels), "--encoder", str(chain.out / "encoder")]
        if stage == "run":
            given += ["--labels", str(chain.labels)]
        self.arguments = given
        self.said = out.with_name(f"{out.name}.stderr")
        self.imported = out.with_name(f"{out.name}.modules")
        self.process = 0
        self.started_ns = self.log_bytes = self.last_step = 0

    def start(self) -> None:
        """Fork a process that runs the command; returns once it answers signals."""
        self.log_bytes = _size(self.out / "run/run.log")
        self.started_ns = time.time_ns()
        self.process = os.fork()
        if not self.process:
            descriptor = os.open(self.said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            from pipelines.cli import main

            try:
                main(self.arguments)
            except SystemExit as ended:
                self.imported.write_text("\n".join(sys.modules))
                os._exit(int(ended.code or 0))
            os._exit(99)
        status = Path(f"/proc/{self.process}/status")
        handled = 1 << (signal.SIGTERM - 1)
        while not self._ended() and not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & handled:
            time.sleep(0.001)

    def end(self, *signals: signal.Signals) -> int:
        """Send signals, a moment apart, and wait: the exit code, negative for a signal."""
        for number in signals:
            os.kill(self.process, number)
            time.sleep(0.002)
        until = time.monotonic() + _PATIENCE_S
        while not self._ended():
            assert time.monotonic() < until, f"{self.stage} does not end after {signals}"
            time.sleep(0.001)
        status = os.waitpid(self.process, 0)[1]
        return os.waitstatus_to_exitcode(status)

    def until(self, wanted: Callable[[], bool], every_s: float = 0.002) -> bool:
        """Wait for a moment; False if the process has ended before it came."""
        limit = time.monotonic() + _PATIENCE_S
        while not wanted():
            assert time.monotonic() < limit, f"{self.stage}: stuck in {self.phase()}"
            if self._ended():
                return False
            time.sleep(every_s)
        return True

    def reach(self, phases: set[str]) -> bool:
        """Wait until it is in one of these phases; False if it has ended before."""
        return self.until(lambda: self.phase() in phases)

    def wait(self, seconds: float) -> bool:
        """Let it run; False if it has ended meanwhile."""
        until = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= until)
        return not self._ended()

    def phase(self) -> str:
        """Where the process is, or was when it died, by what it has written."""
        if (self.out / CARD).exists():
            return "done"
        return self._phase_of_localize() if self.stage == "localize" else self._phase_of_training()

    def _phase_of_localize(self) -> str:
        out = self.out
        if (out / "corpus").exists() and not (out / "corpus" / CARD).exists():
            return "corpus"
        if _size(out / "run/run.log") == self.log_bytes:
            return "set-up"
        if (out / "run/regions.json").exists():
            return "card"
        finished = {path.stem for path in out.glob("journal/*.done")}
        if any(_new(path, self.started_ns) for path in out.glob("regions.zarr/maps*/.*.tmp")):
            return "assembly"
        states = {path.stem: path.read_text() for path in out.glob("journal/*.state")}
        shards = json.loads((out / "journal/layout.json").read_bytes())
        count = -(-int(shards["samples"]) // int(shards["rows_per_shard"]))
        if len(finished) == count:
            return "finalise"
        whole = [name for name, text in states.items() if f'"done": {shards["rows_per_shard"]},' in text]
        return "assembly" if set(whole) - finished else "rows"

    def _phase_of_training(self) -> str:
        out = self.out
        if _size(out / "run/run.log") == self.log_bytes:
            return "set-up"
        if any(_new(path, self.started_ns) for path in out.glob("run/state/.step-*.draft")):
            return "saving"
        marker = out / "run/state.json"
        if marker.exists() and json.loads(marker.read_bytes())["step"] == self.last_step:
            return "publish" if _new(out / "report.html", self.started_ns) else "export"
        return "steps"

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _new(path: Path, since_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns > since_ns
    except FileNotFoundError:
        return False


class Trials:
    """Commands of one stage, their uninterrupted run, and what came of each end."""

    def __init__(self, stage: str, root: Path, settings: list[str]) -> None:
        self.stage, self.root, self.settings = stage, root, settings
        self.chain = Chain(root)
        self.random = random.Random(f"kills of {stage}")
        self.folders = 0
        self.phases: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.ids: set[str] = set()
        self._import()
        self.whole = self._whole()

    def _command(self) -> Command:
        self.folders += 1
        command = Command(self.stage, self.chain, self.root / f"{self.stage}-{self.folders}", self.settings)
        command.last_step = getattr(self, "last_step", -1)
        return command

    def _import(self) -> None:
        command = self._command()
        command.start()
        assert command.end(signal.SIGTERM) == 75, command.said.read_text()  # in the midst of its imports
        command.start()
        assert command.end() == 0, command.said.read_text()
        self._finished(command)
        for module in command.imported.read_text().split():
            importlib.import_module(module)
        assert len(os.listdir("/proc/self/task")) == 1  # else a fork could copy a lock that is held

    def _whole(self) -> str:
        command = self._command()
        begun = time.monotonic()
        command.start()
        if self.stage != "localize":
            command.until(lambda: (command.out / "run/state").is_dir())
        marker = command.out / "run/state.json"
        last = (lambda: command.phase() in FINAL) if self.stage == "localize" else (lambda: False)
        times: list[tuple[int, float]] = []

        def watch() -> bool:
            if marker.exists():
                times.append((json.loads(marker.read_bytes())["step"], time.monotonic()))
            return last()

        command.until(watch, every_s=0.02)
        final = time.monotonic()
        assert command.end() == 0, command.said.read_text()
        self.whole_s = time.monotonic() - begun
        if times:
            self.last_step = times[-1][0]
            final = next(at for step, at in times if step == self.last_step)
        self.final_s = time.monotonic() - final
        return self._finished(command)

    def _finished(self, command: Command) -> str:
        card = read_card(command.out)
        assert not verify(command.out, card)
        assert not list(command.out.rglob("lease.json"))
        self.ids.add(card.artifact_id)
        return card.artifact_id

    def kill(self, aims: list[str]) -> None:
        """Kill one command after the other, as often as there are aims, and continue what was killed."""
        self.random.shuffle(aims)
        command = self._command()
        tries = 0
        while aims:
            tries += 1
            assert tries < 200, f"{aims} cannot be met; so far {self.phases}"
            aim = aims[-1]
            command.start()
            longest_s = {"anywhere": min(self.whole_s, _LONGEST_S), "final": self.final_s * 0.8}.get(aim, 0.004)
            alive = aim == "anywhere" or (command.reach({aim} | FINAL) and (aim == "final" or command.phase() == aim))
            alive = alive and command.wait(self.random.random() * longest_s)
            code = command.end(signal.SIGKILL) if alive else command.end()
            if code == -signal.SIGKILL:
                phase = command.phase()
                met = aim == "anywhere" or phase == aim or (aim == "final" and phase in FINAL)
                self.phases[phase] += 1
                if met:
                    aims.pop()
            else:
                assert code == 0, command.said.read_text()
                self.codes[code] += 1
            if (command.out / CARD).exists():
                self._finished(command)
                command = self._command()
        command.start()
        assert command.end() == 0, command.said.read_text()
        self._finished(command)

    def terminate(self, aims: list[str]) -> None:
        """End one command by SIGTERM in each phase in turn, or twice at once, and continue it each time."""
        command = self._command()
        for aim in aims:
            phase = aim.removesuffix(" twice")
            command.start()
            command.reach({phase, "done"} | (FINAL if phase == "final" else set()))
            reached = command.phase()
            code = command.end(*[signal.SIGTERM] * (2 if aim.endswith("twice") else 1))
            self.phases[f"{aim}: {reached}"] += 1
            self.codes[code] += 1
            done = (command.out / CARD).exists()
            # The second may come when the command has given everything back and only its exit is left.
            late = aim.endswith("twice") and code == -signal.SIGTERM and "interrupted" in command.said.read_text()
            assert code == 75 or (code == 0 and done) or late, (aim, code, command.said.read_text())
            left = list(command.out.rglob("lease.json"))  # a second signal may come while it is given back
            assert not left or (aim.endswith("twice") and lease_holder(command.out) is None), aim
            if done:
                self._finished(command)
                command = self._command()
        command.start()
        assert command.end() == 0, command.said.read_text()
        assert "Traceback" not in command.said.read_text(), command.said.read_text()
        self._finished(command)


def serve(stage: str, root: Path, settings: list[str], kills: list[str], stops: list[str]) -> dict[str, Any]:
    """Do all trials of a stage."""
    trials = Trials(stage, root, settings)
    trials.kill(kills)
    killed = dict(trials.phases)
    trials.phases.clear()
    trials.codes.clear()
    trials.terminate(stops)
    return {
        "whole": trials.whole,
        "ids": sorted(trials.ids),
        "killed": killed,
        "stopped": dict(trials.phases),
        "codes": {str(code): count for code, count in trials.codes.items()},
        "seconds": [round(trials.whole_s, 2), round(trials.final_s, 2)],
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(serve(request["stage"], Path(request["root"]), *request["plan"])))
