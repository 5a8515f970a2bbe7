"""Two processes with gloo follow one on batches with images and without: DDP, and FSDP2 with a tower that trains."""

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
from tiny_llava import save_image, save_llava


class Steps(Callback):
    """Writes down, of every batch on this process, its loss and whether it has images."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.images: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))
        self.images.append("vision" in batch)


def save_conversations(folder: Path) -> None:
    """Conversations about an image and about none, with answers of one length."""
    rows: list[dict[str, Any]] = []
    for number in range(28):
        # one token each in the tiny tokenizer
        answer = ("hot", "true")[number % 5 % 2]
        question = f"is {number % 7} {'cold' * (number % 3)}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row: dict[str, Any] = {"id": str(number), "conversations": turns}
        if number % 3:
            row["image"] = save_image(folder / f"{number}.png", number).name
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows))


def fit(kind: str, llava: str, folder: Path, devices: int) -> None:
    """Train for two epochs on global batches of four; writes losses and what trained."""
    from datamodules import LlavaInstructions
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlava
    from dora_lightning.callbacks import ShardedTraining

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = DoRALlava(
        llava,
        AdapterConfig(rank=4, target_modules=["q_proj", "down_proj"]),
        partial(AdamW, lr=0.003),
        vision_tower="full",
    )
    data = LlavaInstructions(
        llava, str(folder.parent / "train.json"), template="vicuna_v1", batch_size=4 // devices, num_workers=0
    )
    strategy: Any = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=2,
        callbacks=[steps, *([ShardedTraining(base_dtype=None)] if kind == "fsdp2" else [])],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "final.ckpt")
    result = {"losses": steps.losses, "images": steps.images}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_follow_one(kind: str, tmp_path: Path) -> None:
    llava = save_llava(tmp_path / "llava")
    save_conversations(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 240, "check": False}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start, folder, devices in (([sys.executable], one, 1), (launch, two, 2)):
        done = subprocess.run([*start, __file__, kind, str(llava), str(folder), str(devices)], **options)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, *ranks = [json.loads(path.read_text()) for path in (*one.glob("rank*"), *sorted(two.glob("rank*")))]
    assert len(ranks) == 2
    assert len(set(expected["images"])) == 2  # batches of both kinds
    for rank in ranks:
        assert rank["images"] == expected["images"]
        assert rank["losses"] == pytest.approx(expected["losses"], abs=2e-5)
    final = [torch.load(folder / "final.ckpt", weights_only=True)["state_dict"] for folder in (one, two)]
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        # attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(final[1][name], value, rtol=1e-3, atol=5e-5)


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
