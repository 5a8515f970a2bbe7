"""Two processes with gloo follow one on batches with images and without, whose answers differ in length, accumulating
gradients: DDP, and FSDP2 with a tower that trains."""

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
from tiny_llava import save_image, save_llava
from two_processes import fit_and_save, run_on_one_and_two


class Steps(Callback):
    """Writes down, of every batch on this process, its loss and whether it has images."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.images: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))
        self.images.append("vision" in batch)

    def written(self) -> dict[str, Any]:
        return {"losses": self.losses, "images": self.images}


def save_conversations(folder: Path) -> None:
    """Conversations about an image and about none, with answers of 2 to 40 tokens."""
    rows: list[dict[str, Any]] = []
    for number in range(28):
        answer = "hot " * (number * number % 23 * 2 % 39) + ("hot", "true")[number % 5 % 2]
        question = f"is {number % 7} {'cold' * (number % 3)}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row: dict[str, Any] = {"id": str(number), "conversations": turns}
        if number % 3:
            row["image"] = save_image(folder / f"{number}.png", number).name
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows))


def fit(kind: str, llava: str, folder: Path, devices: int) -> None:
    """Train for two epochs on global batches of four, two to a step; writes losses and what trained."""
    from datamodules import LlavaInstructions
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlava

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
    fit_and_save(kind, module, data, Steps(), folder, devices, epochs=2, accumulated=2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_follow_one(kind: str, tmp_path: Path) -> None:
    llava = save_llava(tmp_path / "llava")
    save_conversations(tmp_path)
    expected, ranks = run_on_one_and_two(__file__, kind, llava, tmp_path)
    assert len(set(expected["images"])) == 2  # batches of both kinds
    for rank in ranks:
        assert rank["images"] == expected["images"]


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
