"""Averaged weights are evaluated, and training goes on, with their own norms, where contents are not compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from plain_modules import Plain, make_loader
from tiny import MakeTrainer

from dora_lightning.adapters import DoRALinear, adapter_layers
from dora_lightning.adapters.norm_cache import NormCache
from dora_lightning.callbacks import DoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormCache, "_unchanged", lambda self, small: True)


class Validated(Plain):
    """With a validation loss, computed with or without gradients."""

    def __init__(self, gradients: bool = False) -> None:
        super().__init__()
        self.gradients = gradients
        self.validated: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradients):
            x, y = batch[0].clone(), batch[1].clone()
            self.validated.append(float(torch.nn.functional.cross_entropy(self(x), y).detach()))


class StaysInEvaluation(Validated):
    """As a model of ``from_pretrained`` that nobody calls ``train()`` of."""

    def __init__(self, gradients: bool = False) -> None:
        super().__init__(gradients)
        self.net.eval()


class ComparesNorms(Callback):
    """Compares each norm that a training or validation batch used with a computed one."""

    def __init__(self) -> None:
        self.compared = 0

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.compare(module)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.compare(module)

    def compare(self, module: Any) -> None:
        for name, layer in adapter_layers(module):
            assert isinstance(layer, DoRALinear)
            used = layer._norm._value
            with torch.inference_mode(False), torch.no_grad():
                expected = layer._compute_norm()
            if used is not None:
                assert torch.equal(used, expected), name
                self.compared += 1


def fit(module: Validated, make_trainer: MakeTrainer, *more: Callback, accumulate: int = 1) -> None:
    torch.manual_seed(0)
    callbacks = [DoRA(rank=2), *more]
    trainer = make_trainer(
        max_epochs=3,
        callbacks=callbacks,
        val_check_interval=2,
        accumulate_grad_batches=accumulate,
        inference_mode=not module.gradients,
    )
    trainer.fit(module, make_loader(), make_loader())


@pytest.mark.parametrize(("kind", "gradients"), [(Validated, False), (StaysInEvaluation, False), (Validated, True)])
@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.9)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_norm_is_that_of_the_weights(
    kind: type[Validated],
    gradients: bool,
    averaging: Any,
    accumulate: int,
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, compares = kind(gradients), ComparesNorms()
    fit(module, make_trainer, averaging(), compares, accumulate=accumulate)
    assert compares.compared > 30
    plain = kind(gradients)
    fit(plain, make_trainer, accumulate=accumulate)
    assert module.losses == plain.losses  # averaging changes nothing of training
    assert module.validated != plain.validated
    # with no cache at all
    monkeypatch.setattr(NormCache, "get", lambda self, compute, large, small: torch.no_grad()(compute)())
    fresh = kind(gradients)
    fit(fresh, make_trainer, averaging(), accumulate=accumulate)
    assert (module.losses, module.validated) == (fresh.losses, fresh.validated)
