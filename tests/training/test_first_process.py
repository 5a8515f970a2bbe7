"""While the first process works alone the others wait for as long as it takes, and learn of its failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dora_lightning.training.first_process import first_process_works

FOLDER = Path(__file__).parent


def test_one_process_just_works() -> None:
    with first_process_works("merging") as works:
        assert works
    with pytest.raises(ValueError, match="as it is"), first_process_works("merging"):
        raise ValueError("as it is")


def test_merging_may_take_longer_than_the_process_group_waits(tiny_llama: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = FOLDER.parents[1]
    done = subprocess.run(
        [*launch, str(FOLDER / "waiting_run.py"), str(tiny_llama), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for merged in (tmp_path / "end", tmp_path / "saved" / "step=2-merged"):
        assert load_file(merged / "model.safetensors").keys() == load_file(tiny_llama / "model.safetensors").keys()
    assert not (tmp_path / "saved" / "step=1-merged").exists()
    reason = "[Errno 28] No space left on device: 'merged'"
    assert (tmp_path / "failure0").read_text() == f"OSError: {reason}"
    assert (
        tmp_path / "failure1"
    ).read_text() == f"RuntimeError: merging failed on the first process: OSError: {reason}"
