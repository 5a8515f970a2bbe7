"""Two processes with gloo follow one process: the same losses, and every test sample judged once."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import arc_row, write_rows


class Losses(Callback):
    """Writes down the loss of every batch on this process."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit_and_test(llama: str, data: str, folder: str, devices: int) -> None:
    """Train on ten global batches of four, two to a step, and test; writes losses, metrics and predictions."""
    from datamodules import CommonsenseDataModule
    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama
    from tasks import CommonsenseQA

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = DoRALlama(
        llama,
        AdapterConfig(rank=4, target_modules=["q_proj", "down_proj"]),
        partial(AdamW, lr=0.01),
        task=CommonsenseQA("both", num_beams=1, max_new_tokens=4),
    )
    samples = CommonsenseDataModule(
        llama,
        data,
        train_tasks=["ARC-Easy"],
        template="plain",
        val_size=4,
        batch_size=4 // devices,
        eval_batch_size=2,
    )
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=CSVLogger(folder, "", ""),
        log_every_n_steps=1,
        callbacks=[losses],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=samples)
    validation = float(trainer.callback_metrics["val/loss"])
    metrics = trainer.test(module, datamodule=samples, verbose=False)[0]
    trainer.save_checkpoint(f"{folder}/final.ckpt")
    result = {"losses": losses.seen, "validation": validation, "metrics": metrics}
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def long_row(number: int) -> dict[str, str]:
    """A question whose right answer is one word or up to 45."""
    row = arc_row(number)
    answer = int(row["answer"][-1]) - 1
    options = ["cold", "hot", "it is"]
    options[answer] += " hot" * (number * number % 23 * 2)
    text = " ".join(f"Answer{place}: {option}" for place, option in enumerate(options, start=1))
    return row | {"instruction": row["instruction"].replace("Answer1: cold Answer2: hot Answer3: it is", text)}


def read(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


def records(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "test_predictions.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["source"], row["instruction"]))


def test_two_processes_follow_one(tiny_llama: Path, commonsense_folder: Path, tmp_path: Path) -> None:
    # targets of 2 to about 50 tokens to train on, in a folder of their own beside the test questions
    data = tmp_path / "data"
    shutil.copytree(commonsense_folder, data)
    write_rows(data / "ARC-Easy" / "train.json", [long_row(number) for number in range(24)])
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    fit_and_test(str(tiny_llama), str(data), str(one), devices=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, __file__, str(tiny_llama), str(data), str(two)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, ranks = read(one, 0), [read(two, rank) for rank in range(2)]

    assert len(expected["losses"]) == 10
    assert ranks[0]["losses"] != ranks[1]["losses"]  # each sees its own samples
    means = [sum(pair) / 2 for pair in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert means == pytest.approx(expected["losses"], abs=1e-5)
    # of the first step of each epoch, the mean of its two terms
    assert sum(expected["losses"][5:7]) < sum(expected["losses"][:2]) - 0.5
    final = [torch.load(folder / "final.ckpt", weights_only=True)["state_dict"] for folder in (one, two)]
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=1e-4, atol=1e-5)

    # nine test samples in uneven shares
    for rank in ranks:
        assert rank["validation"] == pytest.approx(expected["validation"], abs=1e-5)
        assert rank["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    rows = records(two)
    assert len(rows) == 9
    for ours, theirs in zip(rows, records(one), strict=True):
        assert ours.pop("log_likelihoods") == pytest.approx(theirs.pop("log_likelihoods"), abs=1e-3)
        assert ours == theirs


if __name__ == "__main__":
    fit_and_test(*sys.argv[1:], devices=2)
