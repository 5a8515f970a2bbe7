"""SIGKILL at random moments: every restart resumes from a whole checkpoint, and the end is that of a run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def killed(llama: Path, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """What :mod:`killed_run` found; its own assertions are about each kill."""
    done = subprocess.run(
        [sys.executable, "killed_run.py", str(llama), str(root), str(kills), str(seed)],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["phases"].values()) == kills
    assert found["same_end"]
    return found


def test_a_few_kills(tiny_llama: Path, tmp_path: Path) -> None:
    found = killed(tiny_llama, tmp_path, kills=4, seed=0)
    assert max(found["steps"]) > 0  # it went on from somewhere


@pytest.mark.slow
def test_many_kills(tiny_llama: Path, tmp_path: Path) -> None:
    found = killed(tiny_llama, tmp_path, kills=40, seed=1)
    assert found["phases"]["saving"] >= 3
    assert found["phases"]["merging"] >= 3
    assert max(found["steps"]) > 10
