"""The loss of an optimizer step is one mean, however many batches it is made of; targets are of 1 to 60 tokens."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from tiny import MakeTrainer
from tiny_llava import save_image, save_llava
from tiny_vl_bart import save_bart
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from vl_bart_example import C, write_grid

from datamodules import InstructionDataModule, LlavaInstructions, PreferenceDataModule
from datamodules.encoding import Collator
from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.visuals import VisualFiles, Visuals
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama, DoRALlamaDPO, DoRALlava, DoRAVLBart
from dora_lightning.callbacks import RunSummary
from dora_lightning.vl_bart import VLBartParts

LENGTHS = [1, 60, 2, 7, 30, 1, 11, 3]
ADAPTER = AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"])
Make = Callable[..., tuple[Any, Any]]
NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Steps(Callback):
    """Writes down the loss and the gradients of every step, and the loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.batches: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        named = module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None})

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.batches.append(float(outputs["loss"]))
        if module.reported_loss is not None:
            self.losses.append(float(module.reported_loss))
            assert float(trainer.callback_metrics["train/loss"]) == self.losses[-1]


def fit(make_trainer: MakeTrainer, module: Any, data: Any, **options: Any) -> tuple[Steps, dict[str, torch.Tensor]]:
    """The steps of a run, and what trained."""
    steps = Steps()
    callbacks = [steps, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(callbacks=callbacks, limit_val_batches=0, **{"max_epochs": 3, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return steps, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def write_rows(folder: Path, lengths: list[int], field: str = "output", **others: Any) -> str:
    rows = [{"instruction": f"is {n} hot?", field: " ".join(["hot"] * k)} | others for n, k in enumerate(lengths)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


def texts(folder: Path, llama: str, lengths: list[int] = LENGTHS, **data: Any) -> Make:
    file = write_rows(folder, lengths)

    def make(batch_size: int, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        given = {"template": "plain", "cutoff_len": 96, "batch_size": batch_size} | data
        return DoRALlama(llama, ADAPTER, **options), InstructionDataModule(llama, file, **given)

    return make


def pairs(folder: Path, llama: str) -> Make:
    rows = [
        {"prompt": f"is {n}?", "chosen": " hot" * k, "rejected": " cold" * (k % 5 + 1)} for n, k in enumerate(LENGTHS)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))

    def make(batch_size: int, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        data = PreferenceDataModule(llama, str(folder / "pairs.json"), template="none", batch_size=batch_size)
        return DoRALlamaDPO(llama, ADAPTER, beta=1.0, **options), data

    return make


def images(folder: Path, share_images: bool = False) -> Make:
    llava = str(save_llava(folder / "llava"))
    rows = []
    for number, length in enumerate(LENGTHS + [5, 9] * 4 * share_images):
        # shared, so that eight rows are left of the sixteen
        name = save_image(folder / f"{number % 8}.png", number % 8).name
        turns = [
            {"from": "human", "value": f"<image>\nis {number}?"},
            {"from": "gpt", "value": "hot " * length + "true"},
        ]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))

    def make(batch_size: int, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        data = LlavaInstructions(
            llava, str(folder / "train.json"), batch_size=batch_size, num_workers=0, share_images=share_images
        )
        return DoRALlava(llava, ADAPTER, **options), data

    return make


class Captions(AskedDataModule):
    """Rows with a short and a long target, one of which is drawn in each epoch."""

    def __init__(self, parts: VLBartParts, folder: str, batch_size: int, by_row: bool) -> None:
        super().__init__(parts, batch_size=batch_size)
        self.folder, self.by_row = folder, by_row

    def asked(self, stage: Any) -> list[Asked]:
        rows = enumerate(LENGTHS if stage == "train" else [])
        return [
            Asked(
                source="captions",
                visuals=("1",),
                before=f"caption {number}",
                answers=(("red " * length, 0.8), ("blue", 0.4)),
                weighted=self.by_row,
                mean_by_sample=self.by_row,
                max_target_tokens=48,
            )
            for number, length in rows
        ]

    def visuals(self) -> dict[str, Visuals]:
        return {"captions": Visuals(VisualFiles(features=self.folder), of_videos=False)}


def captions(folder: Path, by_row: bool) -> Make:
    parts = VLBartParts(str(save_bart(folder / "bart")), feature_dim=C)
    write_grid(folder / "features", "1")

    def make(batch_size: int, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = DoRAVLBart(parts, AdapterConfig(rank=4, target_modules=["q_proj", "v_proj"]), **options)
        return module, Captions(parts, str(folder / "features"), batch_size, by_row)

    return make


KINDS: dict[str, Callable[[Path, str], Make]] = {
    "texts": texts,
    "rows of a batch": partial(texts, packing_len="batch"),
    "pairs": pairs,
    "images": lambda folder, _: images(folder),
    "shared images": lambda folder, _: images(folder, share_images=True),
    "captions": lambda folder, _: captions(folder, by_row=False),
    "answers": lambda folder, _: captions(folder, by_row=True),
}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        # of the biases of keys no gradient is left but rounding, which Adam makes steps of
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(
                other[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_step_are_as_good_as_one(
    kind: str, tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    make = KINDS[kind](tmp_path, str(tiny_llama))
    # an epoch is a step: eight samples in one, two and four batches
    optimizers = (
        [partial(AdamW, lr=1e-3, eps=1e-6)]
        if kind != "texts"
        else [partial(AdamW, lr=1e-3, eps=1e-6), partial(SGD, lr=0.05)]
    )
    for optimizer in optimizers:
        whole, weights = fit(make_trainer, *make(8, optimizer=optimizer))
        assert len(whole.losses) == 3
        for batches in (2, 4):
            options = {"accumulate_grad_batches": batches}
            steps, ours = fit(make_trainer, *make(8 // batches, optimizer=optimizer), **options)
            assert steps.losses == pytest.approx(whole.losses, abs=1e-5)
            for expected, found in zip(whole.gradients, steps.gradients, strict=True):
                close(expected, found)
            close(weights, ours)
    module, data = make(2, optimizer=optimizers[-1], loss_mean="batches")
    steps, _ = fit(make_trainer, module, data, accumulate_grad_batches=4)
    published = sum(steps.batches[:4])  # the mean of means: each was divided by four
    if kind in ("pairs", "answers"):  # of which each batch has as many
        assert published == pytest.approx(whole.losses[0], abs=1e-5)
    else:
        assert abs(published - whole.losses[0]) > 1e-3


def test_one_batch_is_as_ever(tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    make = texts(tmp_path, str(tiny_llama))
    tokens, batches = (fit(make_trainer, *make(4, loss_mean=mean)) for mean in ("tokens", "batches"))
    assert tokens[0].batches == batches[0].batches == tokens[0].losses == batches[0].losses
    for name, value in tokens[1].items():
        assert torch.equal(batches[1][name], value)


def by_hand(module: Any, loader: Any, windows: list[list[int]]) -> list[float]:
    """The mean loss over the tokens of the batches of each step, out of logits of the whole model."""
    batches = list(loader)
    losses = []
    with torch.no_grad():
        for window in windows:
            found = []
            for number in window:
                batch = batches[number]
                logits = module.language_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                found.append(
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
                )
            found = [each[each > 0] for each in found]
            losses.append(float(torch.cat(found).mean()))
    return losses


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"accumulate_grad_batches": 2}, [[0, 1], [2, 3], [4]]),
        ({"accumulate_grad_batches": 3, "limit_train_batches": 4}, [[0, 1, 2], [3]]),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 0.6}, [[0, 1], [2]]),
        ({"callbacks": [GradientAccumulationScheduler({0: 4, 1: 2})]}, [[0, 1, 2, 3], [4]]),
        ({"accumulate_grad_batches": 9}, [[0, 1, 2, 3, 4]]),
    ],
    ids=["shorter", "limit", "share", "scheduler", "longer than an epoch"],
)
def test_steps_are_those_of_the_trainer(
    tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer, options: dict[str, Any], windows: list[list[int]]
) -> None:
    make = texts(tmp_path, str(tiny_llama), [*LENGTHS, 40, 1])
    module, data = make(2, optimizer=partial(SGD, lr=0.0))
    steps, _ = fit(make_trainer, module, data, **{"max_epochs": 1, **options})
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(0)
    assert steps.losses == pytest.approx(by_hand(module, loader, windows), abs=1e-5)


def test_the_summary_has_the_losses_of_steps(tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    make = texts(tmp_path, str(tiny_llama), [*LENGTHS, 40, 1])
    summary = RunSummary(plots=False)
    module, data = make(2, optimizer=partial(SGD, lr=0.05))
    steps, _ = fit(make_trainer, module, data, accumulate_grad_batches=2, callbacks=[summary], max_epochs=1)
    assert summary.facts is not None
    assert summary.facts.losses == (steps.losses[0], steps.losses[-1])
    assert summary.facts.progress.losses.unit == "steps"


def test_a_number_that_changes_with_the_epoch_holds_when_resumed(
    tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    make = texts(tmp_path, str(tiny_llama))

    def run(**options: Any) -> tuple[Steps, dict[str, torch.Tensor]]:
        saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), saver]
        return fit(make_trainer, *make(2, optimizer=partial(AdamW, lr=1e-2)), callbacks=callbacks, **options)

    whole, weights = run()
    assert len(whole.losses) == 4 + 2 + 2
    # in the middle of the second epoch, whose first hook a resumed run does not see
    resumed, ours = run(ckpt_path=str(tmp_path / "checkpoints" / "step=5.ckpt"))
    assert resumed.losses == whole.losses[5:]
    for name, value in weights.items():
        assert torch.equal(ours[name], value)


@NO_VALIDATION
def test_a_step_that_was_planned_otherwise_is_refused(
    tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    make = texts(tmp_path, str(tiny_llama))
    module, data = make(2)
    data.setup("fit")
    trainer = make_trainer(accumulate_grad_batches=2, limit_val_batches=0)
    with pytest.raises(
        ValueError, match=r"steps of 1, and trainer\.accumulate_grad_batches is 2: .*loss_mean: batches"
    ):
        trainer.fit(module, data.train_dataloader())

    class Miscounted(Collator):
        def supervised(self, encoded: Any) -> tuple[str, int]:
            return "tokens", len(encoded)

    class Own(InstructionDataModule):
        def train_collator(self) -> Any:
            return Miscounted(0, 96)

    own = Own(str(tiny_llama), str(tmp_path / "rows.json"), template="plain", batch_size=2)
    with pytest.raises(ValueError, match=r"mean over \d+, and the collator's supervised\(\) said 2 beforehand"):
        make_trainer(limit_val_batches=0).fit(make(2)[0], datamodule=own)
    with pytest.raises(ValueError, match="loss_mean must be one of tokens, batches, found 'mean'"):
        make(2, loss_mean="mean")


@NO_VALIDATION
def test_batches_that_know_no_step_are_averaged_and_it_is_said_once(
    tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    make = texts(tmp_path, str(tiny_llama))
    _, data = make(4)
    data.setup("fit")
    plain = [{name: value for name, value in batch.items() if name != "step"} for batch in data.train_dataloader()]
    loader = DataLoader(plain, batch_size=None)  # type: ignore[arg-type]

    def run(accumulated: int, **options: Any) -> Steps:
        steps = Steps()
        trainer = make_trainer(
            callbacks=[steps], max_epochs=2, accumulate_grad_batches=accumulated, limit_val_batches=0
        )
        trainer.fit(make(4, optimizer=partial(SGD, lr=0.05), **options)[0], loader)
        return steps

    with caplog.at_level("INFO"):
        told = run(2)
    assert caplog.text.count("mean of its batches' means") == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        asked = run(2, loss_mean="batches")
        run(1)
    assert "means" not in caplog.text
    assert told.losses == asked.losses == [2 * loss for loss in asked.batches]
