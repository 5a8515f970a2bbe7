"""A script run on one process and on two with gloo, to see that two follow one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


def fit_and_save(
    kind: str,
    module: LightningModule,
    data: Any,
    steps: Any,
    folder: Path,
    devices: int,
    epochs: int,
    accumulated: int = 1,
) -> None:
    """Train under DDP or FSDP2, or on one device; writes ``final.ckpt``, and what ``steps`` wrote down as JSON.

    Args:
        kind: ``ddp`` or ``fsdp2``.
        module: What to train.
        data: Its datamodule.
        steps: Callback with lists as attributes, ``losses`` among them, and ``written()`` that returns them.
        folder: Where to write.
        devices: One or two.
        epochs: How long.
        accumulated: Batches of a step.
    """
    from dora_lightning.callbacks import ShardedTraining

    strategy: Any = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=accumulated,
        callbacks=[steps, *([ShardedTraining(base_dtype=None)] if kind == "fsdp2" else [])],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "final.ckpt")
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(steps.written()))


def run_on_one_and_two(
    script: str, kind: str, model: Path, folder: Path, **variables: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process wrote down and what each of two did, of ``script kind model folder devices``.

    The losses of all of them are equal, and so is what trained.
    """
    one, two = folder / "one", folder / "two"
    for place in (one, two):
        place.mkdir()
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", **variables}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 240, "check": False}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start, place, devices in (([sys.executable], one, 1), (launch, two, 2)):
        done = subprocess.run([*start, script, kind, str(model), str(place), str(devices)], **options)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, *ranks = [json.loads(path.read_text()) for path in (*one.glob("rank*"), *sorted(two.glob("rank*")))]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    final = [torch.load(place / "final.ckpt", weights_only=True)["state_dict"] for place in (one, two)]
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        # attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(final[1][name], value, rtol=0, atol=1e-5)
    return expected, ranks
