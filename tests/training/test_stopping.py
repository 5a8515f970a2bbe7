"""SIGTERM under DDP: both processes end, whichever was asked; one process is tested in test_cli.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_two_processes_end_together() -> None:
    done = subprocess.run(
        [sys.executable, "stopped_run.py"],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # the second stands for one that Lightning started: it leaves the exit code to the first
    assert json.loads(done.stdout.splitlines()[-1]) == [[143, 0]] * 6, done.stderr[-3000:]
    assert done.stderr.count("dora-lightning: stopped by SIGTERM. Go on so.") == 6
