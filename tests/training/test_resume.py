"""A resumed run follows the present config where it changed, and the uninterrupted run where it did not."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import MakeBackbone, MakeData, MakeTrainer
from torch.optim import AdamW

from dora_lightning.training import WarmupDecay
from dora_lightning.training.resume import apply_overrides, configured_options


class Rates(Callback):
    """Writes down the learning rates that each step is made with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def run(make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer) -> Any:
    def fit(ckpt_path: Path | None = None, stop: int = 10, **options: Any) -> tuple[Trainer, list[list[float]]]:
        rates = Rates()
        # stopped by a limit of batches, so that the length of the run is the same
        trainer = make_trainer(max_steps=10, callbacks=[rates])
        options.setdefault("lr_scheduler", partial(WarmupDecay, warmup=2))
        if stop < 10:
            trainer.callbacks.append(StopAt(stop))
        trainer.fit(make_backbone(**options), datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        return trainer, rates.seen

    return fit


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            trainer.should_stop = True


def test_without_a_change_rates_are_those_of_an_uninterrupted_run(run: Any, tmp_path: Path) -> None:
    _, whole = run()
    _, first = run(stop=4)
    _, second = run(tmp_path / "stopped.ckpt")
    assert first + second == whole
    assert len(whole) == 10


def test_a_changed_rate_wins_is_logged_and_keeps_the_place_of_the_schedule(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole = run()
    run(stop=4)
    with caplog.at_level(logging.INFO):
        _, second = run(tmp_path / "stopped.ckpt", lr=0.03)
    expected = 3 * torch.tensor(whole[4:])  # 0.01 -> 0.03
    torch.testing.assert_close(torch.tensor(second), expected)
    assert "The config overrides the checkpoint: lora_A.lr: 0.03 (checkpoint: 0.01)" in caplog.text
    assert "magnitude.lr: 0.03" in caplog.text


def test_a_changed_rate_wins_where_each_rate_follows_from_the_last(run: Any, tmp_path: Path) -> None:
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8)
    _, whole = run(lr_scheduler=decay)
    run(stop=4, lr_scheduler=decay)
    _, second = run(tmp_path / "stopped.ckpt", lr=0.03, lr_scheduler=decay)
    torch.testing.assert_close(torch.tensor(second), 3 * torch.tensor(whole[4:]))


def test_a_changed_rate_wins_without_a_schedule(run: Any, tmp_path: Path) -> None:
    run(stop=4, lr_scheduler=None)
    _, second = run(tmp_path / "stopped.ckpt", lr=0.03, lr_scheduler=None)
    assert second == [[pytest.approx(0.03)] * 3] * 6


def test_other_options_win_too(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(stop=4)
    with caplog.at_level(logging.INFO):
        trainer, _ = run(
            tmp_path / "stopped.ckpt", optimizer=partial(AdamW, lr=0.01, betas=(0.5, 0.9), weight_decay=0.2)
        )
    assert {group["betas"] for group in trainer.optimizers[0].param_groups} == {(0.5, 0.9)}
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.2, 0.2]
    assert "lora_A.weight_decay: 0.2 (checkpoint: 0.01)" in caplog.text
    assert "magnitude.weight_decay" not in caplog.text


def test_nothing_is_said_where_nothing_changed(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(stop=4)
    with caplog.at_level(logging.INFO):
        run(tmp_path / "stopped.ckpt")
    assert "overrides" not in caplog.text


def test_an_override_outlives_another_interruption(run: Any, tmp_path: Path) -> None:
    _, whole = run(lr=0.03)
    run(stop=3)
    _, second = run(tmp_path / "stopped.ckpt", stop=6, lr=0.03)
    _, third = run(tmp_path / "stopped.ckpt", lr=0.03)
    torch.testing.assert_close(torch.tensor(second + third), torch.tensor(whole[3:]))


def test_a_rate_of_zero_in_the_checkpoint_can_be_left() -> None:
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=0.0)
    saved = configured_options([optimizer])
    configured = [[saved[0][0] | {"lr": 0.1}]]
    assert apply_overrides(saved, configured, [optimizer], []) == ["0.lr: 0.1 (checkpoint: 0.0)"]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimisers_with_other_groups_are_left_alone() -> None:
    optimizer = AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert apply_overrides([], configured_options([optimizer]), [optimizer], []) == []
    assert apply_overrides([[]], configured_options([optimizer]), [optimizer], []) == []
