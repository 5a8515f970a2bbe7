"""A study whose command is killed in the middle of a run, one of whose cells fails, and that is run again."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from studies import open_study, pretend, write_study
from tiny import RunCLI, save_llama

from dora_lightning.comparing import running
from dora_lightning.files.locks import FolderLock
from dora_lightning.training.run_curves import logged_parts, read_curves

ROOT = Path(__file__).parents[2]
STEPS = 150


def compare(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "dora_lightning", "compare", "study.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def content(commonsense: Path) -> dict[str, Any]:
    checkpoint = {"save_last": True, "save_top_k": 0, "every_n_train_steps": 20}
    return {
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlama",
            "init_args": {
                "model_name_or_path": "llama",
                "adapter": {"method": "dora", "rank": 4, "target_modules": ["q_proj"]},
            },
        },
        "data": {
            "class_path": "datamodules.CommonsenseDataModule",
            "init_args": {"data_dir": str(commonsense), "val_size": 8, "batch_size": 4, "template": "plain"},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 10,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}],
        },
    }


def read_curve_file(path: Path) -> list[int]:
    """The steps of a table of metrics."""
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@dataclass
class Found:
    """What the two commands left behind, and how it was in between."""

    folder: Path
    states_after_kill: list[str]
    states_in_between: list[str]
    finished_at: float
    steps_kept: int
    code: int
    out: str


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, commonsense_folder: Path) -> Found:
    folder = tmp_path_factory.mktemp("study")
    save_llama(folder / "llama")
    (folder / "base.yaml").write_text(yaml.safe_dump(content(commonsense_folder)))
    study = {
        "folder": "runs",
        "configs": ["base.yaml"],
        "axes": {
            "case": {
                "done": {"seed_everything": 1},
                "long": {"trainer.max_steps": STEPS, "seed_everything": 2},
                "broken": {"data.init_args.val_size": 1000},
            }
        },
        "metrics": {"val/loss": "lower"},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretend(open_study(Path("study.yaml"))[1][0], {"val/loss": 1.25})
    process = compare(folder)
    last = folder / "runs/long/version_0/checkpoints/last.ckpt"
    wait_for(last, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        folders = open_study(Path("study.yaml"))[1]
        orphaned = [cell.state for cell in folders]
        os.kill(json.loads((folder / "runs/long/lock").read_text())["pid"], signal.SIGKILL)
        while folders[1].lock.holder():
            time.sleep(0.05)
        between = [cell.state for cell in folders]
    finished_at = (folder / "runs/done/version_0/result.json").stat().st_mtime
    steps_kept = max(read_curves(logged_parts(folder / "runs/long/version_0"))["train/loss"])
    code, out, _ = finish(compare(folder))
    return Found(folder, orphaned, between, finished_at, steps_kept, code, out)


def test_a_run_that_outlives_the_command_is_known_to_be_at_it(found: Found) -> None:
    assert found.states_after_kill == ["done", "running", "waiting"]
    assert found.states_in_between == ["done", "interrupted", "waiting"]


def test_the_interrupted_cell_goes_on_and_finished_ones_are_left_alone(found: Found) -> None:
    runs = found.folder / "runs"
    assert (runs / "done/version_0/result.json").stat().st_mtime == found.finished_at
    assert [path.name for path in (runs / "long").glob("version_*")] == ["version_0"]
    assert json.loads((runs / "long/version_0/result.json").read_text())["steps"] == STEPS
    assert found.steps_kept < STEPS - 1  # it was killed on the way
    curve = read_curves(logged_parts(runs / "long/version_0"))["train/loss"]
    assert list(curve) == list(range(STEPS))
    second = read_curve_file(runs / "long/version_0/metrics_1/metrics.csv")
    assert 20 <= min(second) <= found.steps_kept + 1  # not from the beginning
    assert "Resuming the interrupted run" in (runs / "long/log.txt").read_text()
    assert "[2/3] long: goes on" in found.out
    assert "[1/3]" not in found.out


def test_a_failing_cell_is_reported_and_the_rest_finish(found: Found) -> None:
    assert found.code == 1
    assert "[3/3] broken: failed (exit code 1)" in found.out
    assert "log runs/broken/log.txt" in found.out
    assert "val_size" in found.out.partition("broken: failed")[2].partition("Report:")[0]
    report = (found.folder / "runs/report.md").read_text()
    assert "2 of 3 cells are done" in report
    assert "`broken`: failed (exit code 1)" in report


def test_what_the_runs_measured_is_in_the_results(found: Found) -> None:
    lines = (found.folder / "runs/results.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    result = json.loads((found.folder / "runs/long/version_0/result.json").read_text())
    assert float(rows[1]["val/loss"]) == result["after"]["val/loss"]
    # A [4, 32] and B [32, 4] and m [32] of q_proj in two layers
    assert int(rows[1]["trainable"]) == 2 * (4 * 32 + 32 * 4 + 32)
    assert float(rows[1]["seconds"]) > 0
    assert float(rows[1]["wall_seconds"]) > 0
    assert int(rows[1]["peak_memory_bytes"]) > 2**26


def test_one_cell_alone_and_a_wrong_one(
    found: Found, run_cli: RunCLI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(found.folder)
    run_cli("compare", "study.yaml", "--cell", "long")
    assert "3 cells in runs, 2 done, 0 to run" in capsys.readouterr().out
    run_cli("compare", "study.yaml", "--list")
    assert re.search(r"2 │ broken +│ broken │ failed", capsys.readouterr().out)
    with pytest.raises(SystemExit) as caught:
        run_cli("compare", "study.yaml", "--cell", "7")
    assert "--cell 7: the study has cells 0 to 2" in str(caught.value)


def test_an_option_that_fit_does_not_know_stops_the_study_before_it_runs(
    tmp_path: Path, run_cli: RunCLI, commonsense_folder: Path
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(content(commonsense_folder)))
    for axes, message in (
        ({"size": {"option": "data.init_args.limit_trian", "values": [4]}}, r"cell 0 \(size4\).*limit_trian"),
        ({"method": {"full": {"model.init_args.adapter.method": "full"}}}, r"cell 0 \(full\).*rank=4 has no effect"),
    ):
        study = {"folder": "runs", "configs": ["base.yaml"], "axes": axes, "metrics": {"val/loss": "lower"}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        with pytest.raises(SystemExit) as caught:
            run_cli("compare", "study.yaml")
        assert re.search(message, str(caught.value), re.DOTALL)
        assert not (tmp_path / "runs").exists()


def test_a_lock_lasts_as_long_as_a_process_it_was_handed_to(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "lock")
    assert lock.acquire()
    child = subprocess.Popen(["sleep", "600"], pass_fds=[lock.descriptor])
    lock.note(child.pid)
    lock.release()  # as when the command is killed, and its run is not
    other = FolderLock(tmp_path / "lock")
    assert not other.acquire()
    assert f"process {child.pid} on " in str(other.holder())
    child.kill()
    child.wait()
    assert other.holder() is None
    assert other.acquire()
    other.release()


STUB = """#!/bin/sh
# in place of the interpreter: -m dora_lightning fit --config base.yaml --config OPTIONS
folder=$(dirname "$7")
echo "begin $CUDA_VISIBLE_DEVICES" >> order.txt
sleep 0.4
echo "end $CUDA_VISIBLE_DEVICES" >> order.txt
mkdir -p "$folder/version_0"
echo '{"steps": 1, "after": {"val/mean/ranking": 0.5, "val/loss": 1}}' > "$folder/version_0/result.json"
"""


def test_side_by_side_each_device_has_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(stub))
    study, folders = open_study(write_study(tmp_path, seeds=[0]))
    running.Runner(study, 5, 2, ["3", "6"], Console(file=io.StringIO())).run(folders)
    assert [folder.state for folder in folders] == ["done"] * 5
    busy: set[str] = set()
    most = 0
    for line in (tmp_path / "order.txt").read_text().splitlines():
        what, device = line.split()
        assert (device in busy) == (what == "end")
        busy ^= {device}
        most = max(most, len(busy))
    assert most == 2
    assert all(folder.attempts[0]["side_by_side"] == 2 for folder in folders)
