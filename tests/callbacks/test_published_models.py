"""LightningModules from packages on PyPI, as they are: ``pip install dora-lightning[published]``, else skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from plain_modules import SaveAt, values
from tiny import MakeTrainer
from torch.utils.data import DataLoader

from dora_lightning.callbacks import DoRA, GroupLearningRates

# what these packages warn of is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 6


class Published(NamedTuple):
    """A module, made anew from the same pretrained weights on every call, and the batches to train it on."""

    make: Callable[[], LightningModule]
    loader: DataLoader


def seeded(make: Callable[[], LightningModule]) -> Callable[[], LightningModule]:
    def run() -> LightningModule:
        torch.manual_seed(0)
        return make()

    return run


def patch_tst() -> Published:
    """Forecasting with a transformer (PatchTST) from GluonTS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("gluonts.torch")
        from gluonts.torch.model.patch_tst.lightning_module import PatchTSTLightningModule

    sizes = {"prediction_length": 4, "context_length": 16, "patch_len": 4, "stride": 4, "d_model": 32, "nhead": 4}
    options = {
        "dim_feedforward": 64,
        "num_encoder_layers": 2,
        "dropout": 0.0,
        "activation": "relu",
        "norm_first": False,
    }
    more = {"num_feat_dynamic_real": 0, "scaling": "mean", "padding_patch": "end"}

    def make() -> LightningModule:
        from gluonts.torch.distributions import StudentTOutput

        return PatchTSTLightningModule({**sizes, **options, **more, "distr_output": StudentTOutput()}, lr=0.01)

    time = torch.arange(20.0)
    series = [torch.sin(time / (2 + number)) + 2 for number in range(16)]
    samples = [
        {
            "past_target": wave[:16],
            "past_observed_values": torch.ones(16),
            "future_target": wave[16:],
            "future_observed_values": torch.ones(4),
        }
        for wave in series
    ]
    return Published(seeded(make), DataLoader(samples, batch_size=8))


def vision_transformer() -> Published:
    """Classification of images (a ViT of timm's) from TorchGeo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchgeo.trainers")
        from torchgeo.trainers import ClassificationTask

    generator = torch.Generator().manual_seed(0)
    samples = [{"image": torch.randn(3, 224, 224, generator=generator), "label": number % 4} for number in range(4)]
    return Published(
        seeded(lambda: ClassificationTask(model="vit_tiny_patch16_224", in_channels=3, num_classes=4, lr=1e-3)),
        DataLoader(samples, batch_size=2),
    )


def fusion_transformer() -> Published:
    """Forecasting with a Temporal Fusion Transformer from PyTorch Forecasting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_forecasting")
        import pandas
        from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    rows = [
        {"series": str(number), "time": step, "value": float(step % (3 + number)) + 1.0}
        for number in range(4)
        for step in range(30)
    ]
    data = TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
    )

    def make() -> LightningModule:
        return TemporalFusionTransformer.from_dataset(data, hidden_size=16, dropout=0.0, learning_rate=0.01)

    return Published(seeded(make), data.to_dataloader(train=True, batch_size=16, shuffle=False))


MODELS = [patch_tst, vision_transformer, fusion_transformer]


class Losses(Callback):
    """Loss of each step, from what the module hands back."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


class Gradients(Callback):
    """Names of the parameters that got a gradient other than zero."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, module: LightningModule, optimizer: Any) -> None:
        self.names |= {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in {"magnitude", "lora_A", "lora_B"}


@pytest.mark.parametrize("published", MODELS)
def test_a_published_model_trains_with_the_callbacks(
    published: Callable[[], Published], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make, loader = published()
    path = tmp_path / "run.ckpt"

    def fit(steps: int, *more: Callback, **options: Any) -> tuple[LightningModule, list[float], Any]:
        module, losses = make(), Losses()
        torch.manual_seed(1)
        callbacks = [GroupLearningRates(lora_B=4, magnitude=2), DoRA(rank=4), losses, *more]
        epochs = steps // len(loader)
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, loader, loader, **options)
        return module, losses.seen, trainer

    steps = max(STEPS, 2 * len(loader)) // len(loader) * len(loader)
    half = len(loader)
    gradients = Gradients()
    whole, losses, trainer = fit(steps, SaveAt(path, half), gradients)
    original = values(make())
    for name, value in values(whole).items():
        if not is_adapter(name):
            assert torch.equal(value, original[name.replace(".base_layer.", ".")]), name
    start = make()
    starting = make_trainer(callbacks=[DoRA(rank=4)], max_epochs=0)
    torch.manual_seed(1)
    starting.fit(start, loader, loader)
    before = values(start)
    moved = {name for name, value in values(whole).items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if is_adapter(name)}
    assert moved == gradients.names <= adapters
    # layers for static variables are given zeros where the data have none
    assert len(moved) > 0.6 * len(adapters)
    assert losses[-1] < losses[0]

    groups = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert groups["lora_B"] == pytest.approx(4 * groups["lora_A"])
    assert groups["magnitude"] == pytest.approx(2 * groups["lora_A"])

    held = torch.load(path, weights_only=False)
    assert {name for name in held["state_dict"] if name in dict(whole.named_parameters())} == set(adapters)
    resumed, rest, _ = fit(steps, ckpt_path=path, weights_only=False)
    assert rest == pytest.approx(losses[half:], rel=1e-6)
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(whole).items())

    trained = sum(whole.get_parameter(name).numel() for name in adapters)
    end = tmp_path / "end.ckpt"
    trainer.save_checkpoint(end)
    assert end.stat().st_size < 3 * 4 * trained + 600_000

    # what is evaluated is the adapted model, in the Trainer of somebody who only evaluates too
    untrained = make_trainer().validate(make(), loader, verbose=False)[0]
    evaluated = make_trainer(callbacks=[DoRA(rank=4)]).validate(
        make(), loader, ckpt_path=end, weights_only=False, verbose=False
    )[0]
    assert evaluated["val_loss"] < untrained["val_loss"]
