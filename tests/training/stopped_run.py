"""Two processes under DDP that are asked to stop, for test_stopping.py; not a test by itself.

This process imports once and forks two for each way of asking. It prints how they ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from dora_lightning.training.stopping import StopOnSignal

SECONDS = 60.0
"""How long both may take to end."""


class Uneven(BoringModel):
    """Its second process has more to test on than the first."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(4000 * (1 + self.trainer.global_rank), 32))


class Ready(Callback):
    """Says that a loop has begun, and makes batches take a moment."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch(batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._batch(batch_idx)

    def _batch(self, batch_idx: int) -> None:
        if batch_idx == 2:
            os.write(self.pipe, b"x")
        time.sleep(0.002)


def process(rank: int, port: int, verb: str, pipe: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    with StopOnSignal(lambda: "Go on so.") as stop:
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=10_000,
            use_distributed_sampler=False,
            callbacks=[stop, Ready(pipe)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        getattr(trainer, verb)(Uneven())


def attempt(verb: str, asked: list[int]) -> list[int | None]:
    """Exit codes of both processes after a signal to some; None for one that had to be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                process(rank, port, verb, writer)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    os.close(writer)
    for _ in children:
        os.read(reader, 1)
    os.close(reader)
    for rank in asked:
        os.kill(children[rank], signal.SIGTERM)
    codes: list[int | None] = []
    deadline = time.monotonic() + SECONDS
    for child in children:
        pid = status = 0
        while not pid and time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        if not pid:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status) if pid else None)
    return codes


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(json.dumps([attempt(verb, asked) for verb in ("fit", "test") for asked in ([0], [1], [0, 1])]))
