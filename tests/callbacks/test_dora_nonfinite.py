"""A LightningModule of a user's own with the callback DoRA: NaN stops it by name, whatever way it optimizes."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from plain_modules import Plain, make_loader
from tiny import MakeTrainer
from torch import nn

from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.callbacks import DoRA

# lightning 2.6 under torch 2.14; pytest.warns raises it anew
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Poisoned(Plain):
    """Its second batch has a NaN in it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return super().training_step((x * math.nan if batch_idx == 1 else x, y), batch_idx)


class TwoByHand(Plain):
    """Two optimizers, stepped by hand; the second one's loss is poisoned in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss * (math.inf if (number, batch_idx) == (1, 1) else 1.0))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        split = self.net["encoder"].parameters(), self.net["head"].parameters()
        return [torch.optim.AdamW(part, lr=0.05) for part in split]


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("module", [Poisoned, TwoByHand])
def test_it_stops_before_the_step(module: type[Plain], make_trainer: MakeTrainer) -> None:
    made = module()
    with pytest.raises(NonFiniteError, match=r"learning rate 0\.05: the loss of batch 1 is (nan|inf)"):
        make_trainer(callbacks=[DoRA(rank=2)]).fit(made, make_loader())
    assert all(value.isfinite().all() for value in weights(made))


@pytest.mark.parametrize("module", [Poisoned, TwoByHand])
def test_it_leaves_the_step_out(module: type[Plain], make_trainer: MakeTrainer) -> None:
    made = module()
    with pytest.warns(UserWarning, match="the step is left out"):
        make_trainer(callbacks=[DoRA(rank=2, on_nonfinite="skip")]).fit(made, make_loader())
    assert all(value.isfinite().all() for value in weights(made))


def test_who_sees_to_it_alone_is_left_alone_but_nan_is_never_saved(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    trainer = make_trainer(callbacks=[DoRA(rank=2, on_nonfinite="ignore"), ModelCheckpoint(tmp_path)])
    with pytest.raises(NonFiniteError, match="no checkpoint is saved of step 4: net"):
        trainer.fit(Poisoned(), make_loader())
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_buffer_may_hold_infinity(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    module = Plain()
    module.register_buffer("mask", torch.full((2, 2), -math.inf))
    make_trainer(callbacks=[DoRA(rank=2), ModelCheckpoint(tmp_path)]).fit(module, make_loader())
    assert list(tmp_path.glob("*.ckpt"))


def test_a_scaler_leaves_infinite_gradients_out_itself(make_trainer: MakeTrainer) -> None:
    class Overflows(Plain):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.batch_idx == 1:
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(math.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = Overflows()
    make_trainer(callbacks=[DoRA(rank=2)], plugins=[plugin]).fit(module, make_loader())
    assert scaler.get_scale() == 512.0  # it has met one
    assert all(value.isfinite().all() for value in weights(module))
    # a loss that is NaN is no overflow of gradients
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    with pytest.raises(NonFiniteError, match="the loss of batch 1 is nan"):
        make_trainer(callbacks=[DoRA(rank=2)], plugins=[plugin]).fit(Poisoned(), make_loader())


def test_an_unknown_choice() -> None:
    with pytest.raises(ValueError, match="on_nonfinite must be one of raise, skip, ignore, got 'stop'"):
        DoRA(on_nonfinite="stop")
