"""LightningModules as a user of the callbacks has them: they know nothing of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 8


def make_net() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()),
            "head": nn.Linear(32, 2),
        }
    )


class Plain(LightningModule):
    """Built in ``__init__``; the network is the same for every process that makes one."""

    def __init__(self, seed: int = 0, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = make_net()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["encoder"](x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class InConfigureModel(Plain):
    """Builds the network in ``configure_model``, guarded as Lightning's documentation asks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = make_net()


class InSetup(Plain):
    """Builds the network in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        InConfigureModel.configure_model(self)


class OptimizerFromInit(Plain):
    """Makes its optimiser in ``__init__``, before any callback can act."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.AdamW(self.parameters(), lr=0.05)

    def configure_optimizers(self) -> Optimizer:
        return self.made


def make_loader(samples: int = 32, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=batch_size, shuffle=shuffle)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class SaveAt(Callback):
    """Saves a checkpoint after an optimiser step, and stops there if asked to."""

    def __init__(self, path: Path, step: int, stop: bool = False, weights_only: bool = False) -> None:
        self.path, self.step, self.stop, self.weights_only = path, step, stop, weights_only

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
            trainer.should_stop = trainer.should_stop or self.stop
