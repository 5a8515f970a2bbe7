"""What the processes of test_sharded_training.py do; not a test by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from datamodules import Stage, TextDataModule
from dora_lightning import AdapterConfig
from dora_lightning.adapters.norm_cache import NormCache
from dora_lightning.backbones import DoRALlama
from dora_lightning.callbacks import MergeOnSave, ShardedTraining
from dora_lightning.data import Sample

STEPS, STOP = 20, 7


class Words(TextDataModule):
    """Targets of one length, so that the mean over two processes is the mean over all tokens."""

    def build_samples(self, stage: Stage) -> list[Sample]:
        words = ("cold", "hot", "true", "false")
        count = {"train": 48, "validate": 8}.get(stage, 0)
        # one token each in the tiny tokenizer
        answers = ("hot", "true")
        return [Sample(f"is {words[n % 4]} {words[n // 4 % 4]}", f" {answers[n % 7 % 2]}") for n in range(count)]


class Record(Callback):
    """Loss of each batch, mean over processes; and a checkpoint after ``STOP`` optimiser steps."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self.losses: list[float] = []
        self.gathered: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))
        at_stop = trainer.global_step == STOP and trainer.fit_loop.epoch_loop.total_batch_idx % 2
        if self.checkpoint is not None and at_stop:
            original = DTensor.full_tensor

            def counted(tensor: Any, **options: Any) -> Any:
                self.gathered.append(tensor.numel())
                return original(tensor, **options)

            DTensor.full_tensor = counted  # type: ignore[method-assign]
            trainer.save_checkpoint(self.checkpoint)
            DTensor.full_tensor = original  # type: ignore[method-assign]


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def fit(
    kind: str, llama: str, folder: Path, name: str, ckpt_path: Path | None = None, merge: bool = False
) -> dict[str, Any]:
    """Train by ``kind`` (``single``, ``ddp``, ``fsdp2``) on global batches of four; returns what is to be compared."""
    devices = 1 if kind == "single" else 2
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(kind) or ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    torch.manual_seed(0)
    module = DoRALlama(
        llama,
        AdapterConfig(rank=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
    )
    record = Record(folder / f"{name}.ckpt" if ckpt_path is None else None)
    callbacks: list[Callback] = [record, ShardedTraining(base_dtype=None, activation_checkpointing=True)]
    if merge:
        callbacks += [
            MergeOnSave("checkpoint"),
            ModelCheckpoint(folder / f"{name}-saved", "{step}", every_n_train_steps=10, save_top_k=-1),
        ]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=merge,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = Words(llama, batch_size=4 // devices)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    sharded = sorted(n for n, p in module.named_parameters() if isinstance(p, DTensor))
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())
    adapters = {n: whole(p.detach()).cpu().clone() for n, p in module.named_parameters() if p.requires_grad}
    torch.save(adapters, folder / f"{name}-rank{trainer.global_rank}.pt")
    fresh, earlier = Words(llama, batch_size=4 // devices), folder / f"{name}-saved" / "step=10.ckpt"
    return {
        "validated": validate(trainer, module, fresh, earlier) if merge else [],
        "losses": record.losses,
        "gathered": record.gathered,
        "sharded": len(sharded),
        "local": local,
        "total": sum(p.numel() for p in module.parameters()),
    }


def validate(trainer: Trainer, module: DoRALlama, data: Words, earlier: Path) -> list[float]:
    """Losses at the end of the fit, of an earlier checkpoint, and of that with weights that were swapped meanwhile."""
    # as on a GPU, where contents are not compared
    compare, NormCache._unchanged = NormCache._unchanged, lambda self, small: True  # type: ignore[method-assign]
    trainer.limit_val_batches = 1.0
    trained = [p for p in module.parameters() if p.requires_grad]
    losses = []
    for path, factor in ((None, 1.0), (earlier, 1.0), (None, 1.5), (None, 1 / 1.5)):
        for parameter in trained:
            parameter.data.mul_(factor)
        found = trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
        losses.append(found[0]["val/loss"])
    NormCache._unchanged = compare  # type: ignore[method-assign]
    return losses


def errors(llama: str, folder: Path) -> dict[str, str]:
    """What is said of strategies that cannot be."""
    found = {}
    for name, options in {
        "distributed": {"save_distributed_checkpoint": True, "tensor_parallel_size": 1, "data_parallel_size": 2},
        "tensor": {"save_distributed_checkpoint": False, "tensor_parallel_size": 2, "data_parallel_size": 1},
    }.items():
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(**options),
            callbacks=[ShardedTraining(None)],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        try:
            trainer.fit(DoRALlama(llama, AdapterConfig(rank=2)), datamodule=Words(llama))
        except ValueError as error:
            found[name] = str(error)
    return found


def main(llama: str, folder: Path, rank: int) -> None:
    """Runs of two processes, one after the other in the same pair of processes."""
    results: dict[str, Any] = {"ddp": fit("ddp", llama, folder, "ddp")}
    results["fsdp2"] = fit("fsdp2", llama, folder, "fsdp2", merge=True)
    results["fsdp2 from fsdp2"] = fit("fsdp2", llama, folder, "two-two", folder / "fsdp2.ckpt")
    results["fsdp2 from single"] = fit("fsdp2", llama, folder, "one-two", folder / "single.ckpt")
    results["ddp from fsdp2"] = fit("ddp", llama, folder, "ddp-two", folder / "fsdp2.ckpt")
    results["errors"] = errors(llama, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"]))
