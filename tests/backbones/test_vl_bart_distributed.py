"""Two processes with gloo follow one on batches of several tasks, targets drawn anew in each epoch: DDP and FSDP2."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import AdamW

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_vl_bart import save_bart
from vl_bart_example import C, write_tasks


class Steps(Callback):
    """Writes down the loss of every batch, its task, and the targets that this process drew for it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sources: list[str] = []
        self.targets: list[list[list[int]]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))
        (source,) = {sample.source for sample in batch["samples"]}
        self.sources.append(source)
        self.targets.append([[t for t in row if t >= 0] for row in batch["labels"].tolist()])


def fit(kind: str, bart: str, folder: Path, devices: int) -> None:
    """Train for three epochs on global batches of two and four rows; writes what each step was."""
    from datamodules import VLBartDataModule
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRAVLBart
    from dora_lightning.callbacks import ShardedTraining
    from dora_lightning.vl_bart import VLBartParts

    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = VLBartParts(bart, feature_dim=C)
    module = DoRAVLBart(parts, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"]), partial(AdamW, lr=0.003))
    tasks = json.loads((folder.parent / "tasks.json").read_text())
    # of these the loss is a mean over samples, which is the mean of two processes' means
    tasks = {name: tasks[name] | {"batch_size": size // devices} for name, size in (("vqav2", 2), ("gqa", 4))}
    data = VLBartDataModule(parts, tasks)
    strategy: Any = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=3,
        callbacks=[steps, *([ShardedTraining(base_dtype=None)] if kind == "fsdp2" else [])],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "final.ckpt")
    (folder / f"rank{trainer.global_rank}.json").write_text(
        json.dumps({"losses": steps.losses, "sources": steps.sources, "targets": steps.targets})
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_follow_one(kind: str, tmp_path: Path) -> None:
    bart = save_bart(tmp_path / "bart")
    (tmp_path / "tasks.json").write_text(json.dumps(write_tasks(tmp_path / "data")))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{root}:{root / 'tests'}", "DORA_LIGHTNING_CACHE": str(tmp_path / "cache")}
    options: dict[str, Any] = {"env": {**os.environ, **paths}, "capture_output": True, "text": True, "timeout": 240}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start, folder, devices in (([sys.executable], one, 1), (launch, two, 2)):
        done = subprocess.run([*start, __file__, kind, str(bart), str(folder), str(devices)], check=False, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, *ranks = [json.loads(path.read_text()) for path in (*one.glob("rank*"), *sorted(two.glob("rank*")))]
    assert len(ranks) == 2
    assert set(expected["sources"]) == {"vqav2", "gqa"}
    for rank in ranks:
        assert rank["sources"] == expected["sources"]
        assert rank["losses"] == pytest.approx(expected["losses"], abs=2e-5)
    # every row of a global batch is on one of the two, with the target that it has on one
    for step, targets in enumerate(expected["targets"]):
        assert sorted(targets) == sorted(ranks[0]["targets"][step] + ranks[1]["targets"][step])
    final = [torch.load(folder / "final.ckpt", weights_only=True)["state_dict"] for folder in (one, two)]
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        # attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(final[1][name], value, rtol=1e-3, atol=5e-5)


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
