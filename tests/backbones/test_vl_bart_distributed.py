"""Two processes with gloo follow one on batches of several tasks, targets drawn anew in each epoch: DDP and FSDP2."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_vl_bart import save_bart
from two_processes import fit_and_save, run_on_one_and_two
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

    def written(self) -> dict[str, Any]:
        return {"losses": self.losses, "sources": self.sources, "targets": self.targets}


def fit(kind: str, bart: str, folder: Path, devices: int) -> None:
    """Train for three epochs on global batches of two and four rows, two to a step; writes what each batch was."""
    from datamodules import VLBartDataModule
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRAVLBart
    from dora_lightning.vl_bart import VLBartParts

    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = VLBartParts(bart, feature_dim=C)
    module = DoRAVLBart(parts, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"]), partial(AdamW, lr=0.003))
    tasks = json.loads((folder.parent / "tasks.json").read_text())
    # of questions the loss is a mean over rows, of captions over tokens, and some steps have both
    sizes = {"vqav2": 2, "gqa": 4, "coco_captions": 2}
    tasks = {name: tasks[name] | {"batch_size": size // devices} for name, size in sizes.items()}
    data = VLBartDataModule(parts, tasks)
    fit_and_save(kind, module, data, Steps(), folder, devices, epochs=3, accumulated=2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_follow_one(kind: str, tmp_path: Path) -> None:
    bart = save_bart(tmp_path / "bart")
    (tmp_path / "tasks.json").write_text(json.dumps(write_tasks(tmp_path / "data")))
    cache = str(tmp_path / "cache")
    expected, ranks = run_on_one_and_two(__file__, kind, bart, tmp_path, DORA_LIGHTNING_CACHE=cache)
    assert set(expected["sources"]) == {"vqav2", "gqa", "coco_captions"}
    for rank in ranks:
        assert rank["sources"] == expected["sources"]
    # every row of a global batch is on one of the two, with the target that it has on one
    for step, targets in enumerate(expected["targets"]):
        assert sorted(targets) == sorted(ranks[0]["targets"][step] + ranks[1]["targets"][step])


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
