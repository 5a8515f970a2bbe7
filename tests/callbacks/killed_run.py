"""A run that is killed again and again, for test_kill.py; not a test by itself.

This process imports once and forks for each attempt, kills it with SIGKILL at a random moment, and looks at what is on
the disk; then it lets the run finish, and makes the same run again without a kill.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from sharded_run import Words

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama
from dora_lightning.callbacks import MergeOnSave, merge_on_save
from dora_lightning.files.digests import file_digest
from dora_lightning.files.folders import MARKER
from dora_lightning.training import atomic_checkpoint
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint
from dora_lightning.training.merging import SOURCE_FILE, merge_to_folder

STEPS = 60
PHASES = ("starting", "training", "saving", "merging")

phase = mmap.mmap(-1, 1)
"""What the attempt is doing, shared with the process that kills it."""


def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        before, phase[0] = phase[0], PHASES.index(name)
        try:
            return function(*args, **options)
        finally:
            phase[0] = before

    return call


class Steps(Callback):
    """Writes the step that training begins at, then one line for each batch."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        phase[0] = PHASES.index("training")
        os.write(self.pipe, f"{trainer.global_step}\n".encode())

    def on_train_batch_start(self, *_: Any) -> None:
        os.write(self.pipe, b"batch\n")


def run(llama: str, folder: Path, pipe: int) -> None:
    """Train, from ``last.ckpt`` if there is one, with a checkpoint and a merged folder at every step."""
    torch.manual_seed(0)
    module = DoRALlama(
        llama,
        AdapterConfig(rank=2, dropout=0.1, target_modules=["q_proj", "down_proj"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
    )
    saver = ModelCheckpoint(folder, "{step}", monitor="train/loss", save_top_k=2, save_last=True, every_n_train_steps=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[MergeOnSave("checkpoint"), Steps(pipe), saver],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module, datamodule=Words(llama, batch_size=4), ckpt_path=last if last.exists() else None, weights_only=True
    )
    trainer.save_checkpoint(folder / "end.ckpt")


def attempt(
    llama: str, folder: Path, batches: int | None, seconds: float = 0.0, aim: str | None = None
) -> dict[str, Any]:
    """Fork, run, and kill, or let it finish.

    It is killed ``seconds`` after so many batches have begun (-1: after the fork), or after the next phase ``aim``.
    """
    reader, writer = os.pipe()
    phase[0] = 0
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(llama, folder, writer)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = [pipe.readline() for _ in range(0 if batches is None else batches + 1)]
        if batches is not None:
            give_up = time.monotonic() + 5  # the run may end before such a phase comes
            while aim is not None and phase[0] != PHASES.index(aim) and time.monotonic() < give_up:
                pass
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        lines += pipe.readlines()
        _, status = os.waitpid(child, 0)
    step = int(lines[0]) if lines and lines[0] else None
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError((folder.parent / "log").read_text()[-3000:])
    return {"step": step, "killed": killed, "phase": PHASES[phase[0]]}


def check_disk(llama: str, folder: Path, scratch: Path) -> int:
    """Every file that is there must be whole; returns the step of the last checkpoint, 0 if there is none."""
    step = 0
    for path in folder.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(read_adapter_checkpoint(path).tensors), path
        step = checkpoint["global_step"] if path.name == "last.ckpt" else step
    base = Path(llama)
    with safe_open(base / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    for merged in folder.glob("*-merged"):
        files = {path.name for path in merged.iterdir()}
        assert files == {path.name for path in base.iterdir()} | {SOURCE_FILE, MARKER}, merged
        with safe_open(merged / "model.safetensors", "pt") as weights:
            assert set(weights.keys()) == names, merged
            assert all(weights.get_tensor(name).isfinite().all() for name in names), merged
        source = json.loads((merged / SOURCE_FILE).read_text())
        checkpoint = folder / source["checkpoint"]
        if checkpoint.exists() and file_digest(checkpoint) == source["sha256"]:
            again = merge_to_folder(llama, read_adapter_checkpoint(checkpoint), scratch, overwrite=True)
            ours, theirs = (path / "model.safetensors" for path in (merged, again))
            assert ours.read_bytes() == theirs.read_bytes(), merged
    return step


def same_end(folder: Path, other: Path) -> bool:
    """Whether two finished runs hold the same weights, moments and merged model, bit for bit."""
    ours, theirs = (torch.load(path / "end.ckpt", weights_only=True) for path in (folder, other))
    moments = [[c["optimizer_states"][0]["state"][n] for n in range(len(c["state_dict"]))] for c in (ours, theirs)]
    return (
        ours["global_step"] == theirs["global_step"] == STEPS
        and all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
        and all(torch.equal(a[key], b[key]) for a, b in zip(*moments, strict=True) for key in a)
        and (folder / "last-merged" / "model.safetensors").read_bytes()
        == (other / "last-merged" / "model.safetensors").read_bytes()
    )


def main(llama: str, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times within some batches from the start of training, one time in six before that.

    Two kills in four are aimed at a save and at a merge: those are short, and a load on the machine changes how often
    a random moment falls into one.
    """
    random_ = random.Random(seed)
    merge_on_save.merge_to_folder = in_phase("merging", merge_to_folder)
    io = atomic_checkpoint.AtomicCheckpointIO
    io.save_checkpoint = in_phase("saving", io.save_checkpoint)  # type: ignore[method-assign]

    reference = root / "uninterrupted"
    reference.mkdir()
    began = time.monotonic()
    attempt(llama, reference, None)
    seconds = (time.monotonic() - began) / STEPS  # a batch with its checkpoint and merge takes no longer

    phases: Counter[str] = Counter()
    finished, steps, folder = 0, [], root / "run0"
    folder.mkdir()
    while sum(phases.values()) < kills:
        last = check_disk(llama, folder, root / "scratch")
        aim = (None, "saving", None, "merging")[sum(phases.values()) % 4]
        batches = -1 if aim is None and random_.random() < 1 / 6 else random_.randrange(12)
        within = 0.001 if aim else 0.2 if batches < 0 else seconds
        result = attempt(llama, folder, batches, random_.uniform(0, within), aim)
        assert result["step"] in (None, last), (result, last)
        if result["killed"] and not (folder / "end.ckpt").exists():
            phases[result["phase"]] += 1
            steps.append(last)
        else:  # it came to its end: begin another
            check_disk(llama, folder, root / "scratch")
            assert same_end(folder, reference)
            finished += 1
            folder = root / f"run{finished}"
            folder.mkdir()
    last = check_disk(llama, folder, root / "scratch")
    result = attempt(llama, folder, None)
    assert result["step"] in (None, last), (result, last)
    check_disk(llama, folder, root / "scratch")
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return {"phases": phases, "steps": steps, "same_end": same_end(folder, reference), "leftovers": leftovers}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    llama_, root_, *numbers = sys.argv[1:]
    found = main(llama_, Path(root_), int(numbers[0]), int(numbers[1]))
    shutil.rmtree(Path(root_) / "scratch", ignore_errors=True)
    print(json.dumps(found))
