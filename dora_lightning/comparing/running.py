"""Runs of cells: each one a ``dora-lightning fit`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

from rich.console import Console
from rich.markup import escape

from dora_lightning.comparing.folders import DONE, CellFolder
from dora_lightning.comparing.results import read_result
from dora_lightning.comparing.study import Study
from dora_lightning.terminal import printable
from dora_lightning.training.run_report import duration

PATIENCE = 60.0
"""Seconds that a run gets to stop after it was asked to."""


class StoppedError(Exception):
    """The study was asked to stop by a signal."""


@dataclass
class _Job:
    folder: CellFolder
    process: subprocess.Popen[bytes]
    slot: int
    started: float
    log: IO[bytes]


class Runner:
    """Runs cells, several at once if wanted, and says what became of each.

    Args:
        study: the study.
        total: how many cells it has.
        jobs: cells to run side by side.
        devices: the device of each of them, as ``CUDA_VISIBLE_DEVICES`` names it; empty for whatever there is.
        console: where progress goes.
    """

    def __init__(self, study: Study, total: int, jobs: int, devices: Sequence[str], console: Console) -> None:
        self.study = study
        self.total = total
        self.jobs = jobs
        self.devices = devices
        self.console = console
        self._running: list[_Job] = []

    def run(self, folders: list[CellFolder]) -> None:
        """Run every cell that is not done and that no other process runs.

        A cell that fails is marked and the others go on. Cells that another process is at are looked at once more in
        the end.

        Raises:
            StoppedError: a signal came; the runs were stopped and go on from their last checkpoints another time.
        """
        waiting, elsewhere = list(folders), []
        with _signals_stop():
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self.jobs:
                        folder = waiting.pop(0)
                        if not self._start(folder):
                            elsewhere.append(folder)
                    self._collect()
                    time.sleep(0.1 if self._running else 0)
                    if not waiting and not self._running:
                        # what another process was at may have been stopped meanwhile
                        waiting, elsewhere = [f for f in elsewhere if f.state != DONE and not f.lock.holder()], []
            finally:
                self._stop()

    def _start(self, folder: CellFolder) -> bool:
        """Start a cell, unless it is done or another process is at it."""
        if folder.state == DONE:
            return True
        if not folder.lock.acquire():
            self._say(folder, f"is run elsewhere ({folder.lock.holder() or 'it has just ended'}), passed over")
            return False
        if folder.run is not None:  # another process has done it just now
            folder.lock.release()
            return True
        goes_on = folder.path.joinpath("version_0").is_dir()
        folder.claim()
        slot = min(set(range(self.jobs)) - {job.slot for job in self._running})
        log = folder.log.open("ab")
        log.write(f"==== {datetime.now():%Y-%m-%d %H:%M:%S} dora-lightning {' '.join(folder.arguments)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_lightning", *folder.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
            # the run holds the lock too: should this process be killed, nobody else runs the cell meanwhile
            pass_fds=[folder.lock.descriptor],
            # signals of the terminal are handed on by us, once
            start_new_session=True,
        )
        folder.lock.note(process.pid)
        self._running.append(_Job(folder, process, slot, time.monotonic(), log))
        where = f" on device {self.devices[slot]}" if self.devices else ""
        self._say(folder, f"{'goes on' if goes_on else 'started'}{where}; log {folder.log}")
        return True

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot]
        elif self.jobs > 1:
            # runs side by side share the cores, instead of each taking all of them
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        return environment

    def _collect(self) -> None:
        """Take in the runs that have ended."""
        for job in list(self._running):
            # not Popen.poll: it would throw away how much memory the process had
            pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
            if pid:
                self._ended(job, os.waitstatus_to_exitcode(status), usage.ru_maxrss)

    def _ended(self, job: _Job, code: int, peak: int) -> None:
        self._running.remove(job)
        job.process.returncode = code
        job.log.close()
        folder, seconds = job.folder, time.monotonic() - job.started
        kibibyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
        folder.add_attempt(
            outcome="ended", seconds=round(seconds, 2), peak_rss_bytes=peak * kibibyte, side_by_side=self.jobs
        )
        if code == 0 and folder.run is not None:
            try:
                self._say(folder, f"{self._scores(folder)}; {duration(seconds)}")
            except ValueError as error:
                # it has finished, so another run would give the same: the study names what is not there
                self._say(folder, f"[red]{escape(printable(str(error)))}[/red]")
        else:
            reason = _reason(code)
            folder.fail(reason)
            lines = "\n    ".join(escape(printable(line)) for line in folder.last_lines())
            self._say(folder, f"[red]failed[/red] ({reason}) after {duration(seconds)}; log {folder.log}\n    {lines}")
        folder.lock.release()

    def _scores(self, folder: CellFolder) -> str:
        values = read_result(self.study, folder).metrics
        return ", ".join(f"{metric.title} {metric.shown(values[metric.name])}" for metric in self.study.metrics)

    def _stop(self) -> None:
        """End the runs that are at it still: they are asked first, so that they may end as they like."""
        for job in self._running:
            job.process.terminate()
        deadline = time.monotonic() + PATIENCE
        for job in self._running:
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # with what it has started: devices of a run that is still there would be taken
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            job.log.close()
            seconds = round(time.monotonic() - job.started, 2)
            job.folder.add_attempt(outcome="stopped", seconds=seconds, peak_rss_bytes=None, side_by_side=self.jobs)
            job.folder.lock.release()
            self._say(job.folder, "stopped" if job.folder.run is None else "done")
        self._running.clear()

    def _say(self, folder: CellFolder, text: str) -> None:
        place = f"[{folder.cell.number + 1}/{self.total}]"
        self.console.print(f"{escape(place)} {escape(folder.cell.name)}: {text}", highlight=False, soft_wrap=True)


def _reason(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else "it ended without a result"


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """Signals that would end this process at once stop the runs first."""

    def stop(number: int, frame: Any) -> None:
        raise StoppedError(signal.Signals(number).name)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
