"""Rates per group and module, for whatever ``configure_optimizers`` returns; the reference is a run without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from plain_modules import Plain, SaveAt, make_loader
from tiny import MakeBackbone, MakeData, MakeTrainer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

from dora_lightning.callbacks import DoRA, GroupLearningRates
from dora_lightning.training import WarmupDecay

STEPS = 12
FACTORS = {"magnitude": 0.5, "lora_A": 1.0, "lora_B": 16.0}


def decayed(module: torch.nn.Module, **options: Any) -> AdamW:
    return AdamW(module.parameters(), **({"lr": 0.01, "weight_decay": 0.1} | options))


def chain(optimizer: Optimizer) -> Any:
    warmup, decay = lrs.LinearLR(optimizer, 0.1, total_iters=6), lrs.CosineAnnealingLR(optimizer, T_max=STEPS - 6)
    return lrs.SequentialLR(optimizer, [warmup, decay], milestones=[6])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=5),
    "SequentialLR": chain,
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.ConstantLR(o, 0.3, 4)]),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.2, total_iters=6),
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.01, step_size_up=4, cycle_momentum=False),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, STEPS, 2.0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.003, anneal_epochs=5),
    "WarmupDecay": lambda o: WarmupDecay(o, warmup=3, decay="cosine", total_steps=STEPS),
}


class Rates(Callback):
    """Writes down the rate of each group that each step is made with, by the group's name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        groups = optimizer.param_groups
        self.seen.append({group.get("name", "all"): float(group["lr"]) for group in groups})


def module_with(configure: Callable[[Plain], Any]) -> Plain:
    module = Plain()
    object.__setattr__(module, "configure_optimizers", lambda: configure(module))
    return module


Fit = Callable[..., tuple[Trainer, list[dict[str, float]]]]


@pytest.fixture
def fit(make_trainer: MakeTrainer) -> Fit:
    def run(configure: Any, *callbacks: Callback, **options: Any) -> tuple[Trainer, list[dict[str, float]]]:
        rates = Rates()
        torch.manual_seed(0)
        fit_options = {key: options.pop(key) for key in ("ckpt_path", "weights_only") if key in options}
        trainer = make_trainer(
            **{"max_steps": STEPS, "max_epochs": -1, "callbacks": [DoRA(rank=2), *callbacks, rates], **options}
        )
        trainer.fit(module_with(configure), make_loader(), **fit_options)
        return trainer, rates.seen

    return run


def check_factors(split: list[dict[str, float]], whole: list[dict[str, float]]) -> None:
    assert len(split) == len(whole)
    assert len({row["all"] for row in whole}) > 1  # a schedule that does not move would show nothing
    for ours, reference in zip(split, whole, strict=True):
        for name, factor in FACTORS.items():
            assert ours[name] == pytest.approx(factor * reference["all"], rel=1e-9), name


# What follows a group ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_follows_its_groups(fit: Fit, name: str) -> None:
    def configure(module: Plain) -> Any:
        optimizer = decayed(module)
        scheduler = SCHEDULERS[name](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    _, whole = fit(configure)
    trainer, split = fit(configure, GroupLearningRates(magnitude=0.5, lora_B=16))
    check_factors(split, whole)
    last = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
    assert last == [group["lr"] for group in trainer.optimizers[0].param_groups]


def test_reduce_on_plateau_follows_its_groups_down_to_its_floor(fit: Fit) -> None:
    def configure(module: Plain) -> Any:
        optimizer = decayed(module, lr=0.01)
        # the loss is never half of what it was, so the rate falls every second epoch
        scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.99, min_lr=2e-4)
        config = {"scheduler": scheduler, "interval": "epoch", "monitor": "train/loss"}
        module.on_train_epoch_end = lambda: module.log("train/loss", module.losses[-1])  # type: ignore[method-assign]
        return {"optimizer": optimizer, "lr_scheduler": config}

    _, whole = fit(configure, max_steps=-1, max_epochs=5)
    _, split = fit(configure, GroupLearningRates(magnitude=0.5, lora_B=16), max_steps=-1, max_epochs=5)
    assert whole[-1]["all"] == 2e-4
    check_factors(split, whole)


def pair(module: Plain) -> tuple[Optimizer, Any]:
    optimizer = decayed(module)
    return optimizer, lrs.ExponentialLR(optimizer, 0.9)


FORMS: dict[str, Callable[[Optimizer, Any], Any]] = {
    "list": lambda o, s: [o],
    "tuple": lambda o, s: (o,),
    "dict": lambda o, s: {"optimizer": o},
    "tuple of lists": lambda o, s: ([o], [s]),
    "list of lists with a dict": lambda o, s: [[o], [{"scheduler": s, "interval": "epoch"}]],
    "a list and a scheduler": lambda o, s: ([o], s),
    "a list and a dict": lambda o, s: ([o], {"scheduler": s}),
    "dict with scheduler": lambda o, s: {"optimizer": o, "lr_scheduler": s},
    "dict with lr_scheduler dict": lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s}},
    "list of a dict": lambda o, s: [{"optimizer": o, "lr_scheduler": s}],
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_configure_optimizers_returns(fit: Fit, form: str) -> None:
    def configure(module: Plain) -> Any:
        return FORMS[form](*pair(module))

    _, whole = fit(configure)
    trainer, split = fit(configure, GroupLearningRates(magnitude=0.5, lora_B=16))
    if trainer.lr_scheduler_configs:
        check_factors(split, whole)
    else:
        assert split == [{"lora_A": 0.01, "lora_B": 0.16, "magnitude": 0.005, "other": 0.01}] * STEPS


def test_an_optimizer_alone(fit: Fit) -> None:
    _, seen = fit(decayed, GroupLearningRates(magnitude=0.5, lora_B=16))
    assert seen == [{"lora_A": 0.01, "lora_B": 0.16, "magnitude": 0.005, "other": 0.01}] * STEPS


@pytest.mark.parametrize("form", ["tuple", "dicts", "lists"])
def test_several_optimizers_with_their_schedulers(make_trainer: MakeTrainer, form: str) -> None:
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            first = SGD(self.net["encoder"].parameters(), lr=0.1)
            second = SGD(self.net["head"].parameters(), lr=0.2)
            schedulers = [lrs.ExponentialLR(first, 0.5), lrs.ExponentialLR(second, 0.1)]
            if form == "tuple":
                return first, second
            if form == "dicts":
                pairs = zip((first, second), schedulers, strict=True)
                return [{"optimizer": o, "lr_scheduler": s} for o, s in pairs]
            return [first, second], schedulers

    module = Manual()
    trainer = make_trainer(max_epochs=1, callbacks=[GroupLearningRates(lora_B=4), DoRA(rank=2)])
    trainer.fit(module, make_loader())
    for optimizer, lr in zip(trainer.optimizers, (0.1, 0.2), strict=True):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"lora_A": lr, "lora_B": 4 * lr, "magnitude": lr, "other": lr})
    for config, gamma, lr in zip(trainer.lr_scheduler_configs, (0.5, 0.1), (0.1, 0.2), strict=False):
        config.scheduler.optimizer.step()
        config.scheduler.step()
        rates = {group["name"]: group["lr"] for group in config.scheduler.optimizer.param_groups}
        assert rates["lora_B"] == pytest.approx(4 * lr * gamma)
        assert rates["lora_A"] == pytest.approx(lr * gamma)


def test_the_backbones_groups_keep_their_names(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[GroupLearningRates(lora_B=16)])
    trainer.fit(make_backbone(lr=0.01), datamodule=make_data())
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == pytest.approx({"magnitude": 0.01, "lora_A": 0.01, "lora_B": 0.16})


def test_an_optimizer_made_from_named_parameters(fit: Fit) -> None:
    trainer, _ = fit(lambda module: AdamW(module.named_parameters(), lr=0.01), GroupLearningRates(lora_B=2))
    for group in trainer.optimizers[0].param_groups:
        assert len(group["param_names"]) == len(group["params"])
        if group["name"] != "other":
            assert all(name.endswith(group["name"]) for name in group["param_names"])


# Rates, decay, patterns, names ---------------------------------------------------------------------------------------


def groups_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for optimizer in trainer.optimizers for group in optimizer.param_groups}


def test_absolute_rates_are_the_peak_of_the_schedule(fit: Fit) -> None:
    def configure(module: Plain) -> Any:
        optimizer = decayed(module)
        return [optimizer], [{"scheduler": WarmupDecay(optimizer, 4, "constant", STEPS), "interval": "step"}]

    _, seen = fit(configure, GroupLearningRates(lora_B={"lr": 0.3}, modules={"head": {"lr": 0.001}}))
    assert seen[0]["lora_B"] == 0
    assert seen[2]["lora_B"] == pytest.approx(0.15)
    assert seen[-1]["lora_B"] == pytest.approx(0.3)
    assert seen[-1]["lora_A"] == pytest.approx(0.01)
    assert seen[-1]["head/lora_A"] == seen[-1]["head/magnitude"] == pytest.approx(0.001)

    def one_cycle(module: Plain) -> Any:
        optimizer = decayed(module)
        return [optimizer], [{"scheduler": lrs.OneCycleLR(optimizer, 0.02, total_steps=20), "interval": "step"}]

    _, seen = fit(one_cycle, GroupLearningRates(lora_B={"lr": 0.3}), max_steps=18)
    assert max(row["lora_B"] for row in seen) == pytest.approx(0.3, rel=0.02)
    assert max(row["lora_A"] for row in seen) == pytest.approx(0.02, rel=0.02)


def test_weight_decay_by_group_and_none_on_magnitudes(fit: Fit) -> None:
    trainer, _ = fit(decayed, GroupLearningRates(lora_A={"weight_decay": 0.3}, modules={"head": 2.0}))
    decay = {name: group["weight_decay"] for name, group in groups_of(trainer).items()}
    assert decay == {
        "magnitude": 0.0,
        "lora_A": 0.3,
        "lora_B": 0.1,
        "other": 0.1,
        "head/magnitude": 0.0,
        "head/lora_A": 0.1,
        "head/lora_B": 0.1,
        "head/other": 0.1,
    }
    trainer, _ = fit(decayed, GroupLearningRates(magnitude={"weight_decay": 0.2}))
    assert groups_of(trainer)["magnitude"]["weight_decay"] == 0.2


def test_the_first_pattern_that_is_found_wins_over_the_groups(fit: Fit) -> None:
    trainer, seen = fit(
        decayed,
        GroupLearningRates(lora_B=16, modules={r"encoder\.0\.": 3.0, r"encoder": 5.0, r"\.head\.": {"lr": 1.0}}),
    )
    assert seen[0] == pytest.approx(
        {f"encoder\\.0\\./{kind}": 0.03 for kind in ("lora_A", "lora_B", "magnitude", "other")}
        | {f"encoder/{kind}": 0.05 for kind in ("lora_A", "lora_B", "magnitude", "other")}
        | {f"\\.head\\./{kind}": 1.0 for kind in ("lora_A", "lora_B", "magnitude", "other")}
    )
    members = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    for name, group in groups_of(trainer).items():
        assert all(members[id(p)].endswith(name.rpartition("/")[2].replace("other", "")) for p in group["params"])
    assert sum(len(group["params"]) for group in groups_of(trainer).values()) == len(members)


def test_learning_rate_monitor_shows_the_names_without_duplicates(fit: Fit, tmp_path: Path) -> None:
    def configure(module: Plain) -> Any:
        encoder, head = module.net["encoder"].parameters(), module.net["head"].parameters()
        optimizer = SGD([{"params": list(encoder)}, {"params": list(head), "lr": 0.2, "name": "own"}], lr=0.1)
        return [optimizer], [lrs.StepLR(optimizer, 1)]

    monitor = LearningRateMonitor()
    fit(
        configure,
        GroupLearningRates(lora_B=16),
        monitor,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    kinds = ("lora_A", "lora_B", "magnitude", "other")
    assert set(monitor.lrs) == {f"lr-SGD/{group}/{kind}" for group in ("0", "own") for kind in kinds}
    assert monitor.lrs["lr-SGD/own/lora_B"][0] == pytest.approx(3.2)


# Resuming and taking over --------------------------------------------------------------------------------------------


class Whole(Callback):
    """Keeps the optimiser's groups and states as they were after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.state = torch.load(self._bytes(trainer), weights_only=True)

    @staticmethod
    def _bytes(trainer: Trainer) -> Any:
        import io

        buffer = io.BytesIO()
        torch.save(trainer.optimizers[0].state_dict(), buffer)
        buffer.seek(0)
        return buffer


@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "LambdaLR", "ChainedScheduler", "WarmupDecay"])
def test_resuming_restores_rates_and_momentum(fit: Fit, tmp_path: Path, name: str) -> None:
    def configure(module: Plain) -> Any:
        optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [{"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}]

    path, end, end_resumed = tmp_path / "run.ckpt", Whole(STEPS), Whole(STEPS)
    rates = {"magnitude": 0.5, "lora_B": 16.0, "modules": {"head": {"lr": 0.002}}}
    _, whole = fit(configure, GroupLearningRates(**rates), end)
    _, first = fit(configure, GroupLearningRates(**rates), SaveAt(path, 4, stop=True))
    _, second = fit(configure, GroupLearningRates(**rates), end_resumed, ckpt_path=path, weights_only=True)
    assert first + second == whole
    for ours, theirs in zip(end_resumed.state["param_groups"], end.state["param_groups"], strict=True):
        assert ours == theirs
    assert end.state["state"]
    for index, state in end.state["state"].items():
        torch.testing.assert_close(end_resumed.state["state"][index], state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SequentialLR", "ChainedScheduler", "plateau"])
def test_a_factor_that_changed_since_the_checkpoint_wins(fit: Fit, tmp_path: Path, name: str) -> None:
    def configure(module: Plain) -> Any:
        optimizer = SGD(module.parameters(), lr=0.01)
        if name == "plateau":
            module.on_train_epoch_end = lambda: module.log("train/loss", 1.0)  # type: ignore[method-assign]
            scheduler = lrs.ReduceLROnPlateau(optimizer, patience=100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss"}}
        return [optimizer], [{"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}]

    path = tmp_path / "run.ckpt"
    fit(configure, GroupLearningRates(lora_B=2), SaveAt(path, 4, stop=True))
    _, expected = fit(configure, GroupLearningRates(lora_B=8))
    _, seen = fit(configure, GroupLearningRates(lora_B=8), ckpt_path=path, weights_only=True)
    for ours, reference in zip(seen, expected[4:], strict=True):
        assert ours == pytest.approx(reference)


def test_another_trainer_does_not_apply_the_factors_again(make_trainer: MakeTrainer) -> None:
    module = Plain(lr=0.01)
    for _ in range(2):
        trainer = make_trainer(max_epochs=1, callbacks=[DoRA(rank=2), GroupLearningRates(lora_B=16)])
        trainer.fit(module, make_loader())
        assert groups_of(trainer)["lora_B"]["lr"] == 0.16
    trainer = make_trainer(max_epochs=1, callbacks=[DoRA(rank=2), GroupLearningRates(lora_B=2)])
    trainer.fit(module, make_loader())
    assert groups_of(trainer)["lora_B"]["lr"] == 0.02


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_that_trains(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"\['haed'\] match no parameter that trains"):
        fit(decayed, GroupLearningRates(modules={"head": 2.0, "haed": 3.0}))
    with pytest.raises(ValueError, match=r"\['base_layer'\] match no parameter that trains"):
        fit(decayed, GroupLearningRates(modules={"base_layer": 2.0}))


def test_a_rate_for_a_group_that_is_not_there(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[DoRA(method="magnitude"), GroupLearningRates(lora_B=16)])
    with pytest.raises(ValueError, match="nothing that trains is in lora_B; there is: magnitude"):
        trainer.fit(Plain(), make_loader())


class PerGroup(lrs.LRScheduler):
    """Somebody else's scheduler, which keeps a list with an entry for each group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.peaks = [2 * group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return self.peaks


class Homemade:
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None: ...
    def state_dict(self) -> None: ...
    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (PerGroup, "PerGroup keeps peaks per group; such a scheduler cannot be split"),
        (Homemade, "Homemade is no torch scheduler; its groups cannot be split"),
        (
            lambda o: lrs.CosineAnnealingLR(o, 10, eta_min=1e-3),
            "CosineAnnealingLR has one eta_min=0.001 for all groups, which cannot follow lora_B's factor 16",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_split(fit: Fit, scheduler: Any, message: str) -> None:
    def configure(module: Plain) -> Any:
        optimizer = decayed(module)
        return [optimizer], [scheduler(optimizer)]

    with pytest.raises(ValueError, match=message):
        fit(configure, GroupLearningRates(lora_B=16))


def test_an_optimizer_that_cannot_be_split(fit: Fit) -> None:
    with pytest.raises(ValueError, match="LBFGS has one group for all parameters"):
        fit(lambda module: torch.optim.LBFGS(module.parameters()), GroupLearningRates(lora_B=16))
    with pytest.raises(ValueError, match="cannot regroup what configure_optimizers returned: str"):
        fit(lambda module: "adam", GroupLearningRates())
    with pytest.raises(ValueError, match="an absolute lr for lora_B needs a group whose own lr is not 0"):
        fit(lambda module: decayed(module, lr=0.0), GroupLearningRates(lora_B={"lr": 0.1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_B": -1}, "lora_B: expected numbers of at least 0, got -1"),
        ({"lora_B": "16"}, "lora_B: expected numbers of at least 0, got '16'"),
        ({"lora_B": float("nan")}, "lora_B: expected numbers"),
        ({"lora_B": True}, "lora_B: expected numbers"),
        ({"magnitude": {"rate": 1.0}}, "magnitude: expected a factor, or a dict"),
        ({"magnitude": {"lr": 1.0, "factor": 2.0}}, "magnitude: expected a factor, or a dict"),
        ({"modules": {"head": {"lr": -1.0}}}, "head: expected numbers"),
        ({"modules": {"(": 1.0}}, r"modules: '\(' is no regular expression"),
    ],
)
def test_bad_rates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupLearningRates(**options)
