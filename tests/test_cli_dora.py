"""``dora-lightning fit --dora.rank 4`` adapts a LightningModule that knows nothing of this library."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dora_lightning.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


class Regressor(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.body(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Noise(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)),
            batch_size=8,
        )


def fit(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Tensor]:
    arguments = ["fit", "--model", "test_cli_dora.Regressor", "--data", "test_cli_dora.Noise"]
    arguments += [
        "--trainer.max_epochs",
        "2",
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        str(folder),
    ]
    monkeypatch.setattr("sys.argv", ["dora-lightning", *arguments, *options])
    main()
    path = next(folder.glob("version_0/checkpoints/*.ckpt"))
    return torch.load(path, weights_only=True)["state_dict"]


def test_dora_block_adapts_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fit(tmp_path, monkeypatch, "--dora.rank", "3", "--dora.target_modules", "[body.0]")
    assert set(held) == {"body.0.lora_A", "body.0.lora_B", "body.0.magnitude"}
    assert held["body.0.lora_A"].shape == (3, 4)
    assert held["body.0.lora_B"].abs().sum() > 0


def test_without_the_block_nothing_is_adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(fit(tmp_path, monkeypatch)) == {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}


def test_unknown_option_of_the_block_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, monkeypatch, "--dora.rnk", "3")
    assert "'rnk' is not accepted" in capsys.readouterr().err
