"""What a run says about itself at its end agrees with what its module has seen, and changes nothing of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from plain_modules import Plain, SaveAt, make_loader, values
from tiny import MakeTrainer, RunCLI
from torch import Tensor, nn

from dora_lightning.callbacks import DoRA, RunSummary
from dora_lightning.callbacks import run_summary as summary_module
from dora_lightning.training.run_curves import read_curves

# DoRA of rank 2 on 8 -> 32 -> 32 -> 2: a magnitude per output, rank times inputs, outputs times rank
MAGNITUDES, A, B = 32 + 32 + 2, 2 * (8 + 32 + 32), 2 * (32 + 32 + 2)
BASE = (8 + 1) * 32 + (32 + 1) * 32 + (32 + 1) * 2


class Clock:
    """Time that passes only where a module says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(summary_module, "time", clock)
    return clock


class Scored(Plain):
    """Logs its losses, and notes them; a training step takes 1 s of ``clock``, a validation 100 s."""

    def __init__(self, clock: Clock | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.clock = clock or Clock()
        self.validated: list[float] = []
        self._held_out: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 1
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self._held_out.append(float(loss))
        self.log("val/loss", loss)

    def on_validation_epoch_end(self) -> None:
        self.clock.now += 100
        held_out, self._held_out = self._held_out, []
        self.validated.append(sum(held_out) / len(held_out))


def logged(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of a Trainer that logs every step and validates after every epoch of four."""
    return {"logger": CSVLogger(folder, "", ""), "log_every_n_steps": 1, "max_epochs": 6, **options}


def page_of(folder: Path) -> dict[str, list[str]]:
    """Cells of the tables of ``summary.md``: first -> the others."""
    lines = [line.strip("| ").split(" | ") for line in (folder / "summary.md").read_text().splitlines() if "|" in line]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_numbers_are_those_the_module_has_seen(
    make_trainer: MakeTrainer, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    module, summary = Scored(clock), RunSummary()
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val/loss", save_last=True)
    callbacks = [summary, saver, LearningRateMonitor(), DoRA(rank=2)]
    make_trainer(**logged(tmp_path, callbacks=callbacks)).fit(module, make_loader(), make_loader(16))
    facts = summary.facts
    assert facts is not None
    assert facts.adapters.groups == {"magnitude": MAGNITUDES, "lora_A": A, "lora_B": B}
    assert facts.measured() == {
        "parameters": {"trainable": MAGNITUDES + A + B, "total": BASE + MAGNITUDES + A + B},
        "seconds": 24.0,
        "peak_memory_bytes": facts.progress.peak_memory,
    }
    # torch alone takes more; what the tests hold beside is far from that
    assert 2**26 < facts.progress.peak_memory < 2**35
    assert (facts.steps, facts.epochs, facts.progress.samples, facts.progress.validating) == (24, 6, 192, 600.0)
    assert facts.losses == pytest.approx((sum(module.losses[:6]) / 6, sum(module.losses[-6:]) / 6))
    best = min(module.validated)
    step = 4 * (module.validated.index(best) + 1)
    assert facts.progress.best["val/loss"] == (pytest.approx(best, abs=1e-6), step)

    page, out = page_of(tmp_path), capsys.readouterr().out
    assert page["val/loss"] == ["", f"{module.validated[-1]:.4g}", f"{best:.4g}", str(step)]
    assert page["lora_A"] == ["", f"{A} parameters"]
    for text in ("24 steps, 6 epochs, 192 samples", "24.0 s of training (8 samples/s), 10 min 0 s of validation"):
        assert text in out
        assert text in (tmp_path / "summary.md").read_text()
    assert f"Adapter checkpoint: {saver.last_model_path}" in out
    assert f"Summary: {tmp_path / 'summary.md'}" in out
    for figure in ("loss.png", "learning_rates.png"):
        assert (tmp_path / figure).stat().st_size > 5000
        assert f"({figure})" in (tmp_path / "summary.md").read_text()


class Killed(Callback):
    """Stops a run as a signal would, after a step."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_counts_all_of_its_parts_and_an_interrupted_one_has_no_summary(
    make_trainer: MakeTrainer, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "at6.ckpt"
    for error in (RuntimeError, KeyboardInterrupt):
        first = Scored(clock)
        callbacks = [RunSummary(), SaveAt(checkpoint, 6), Killed(9, error)]
        trainer = make_trainer(**logged(tmp_path, callbacks=callbacks))
        with pytest.raises((error, SystemExit)):
            trainer.fit(first, make_loader(), make_loader(16))
    assert "Run summary" not in capsys.readouterr().out
    assert not (tmp_path / "summary.md").exists()

    clock.now += 5000  # between the parts
    module, summary = Scored(clock), RunSummary()
    make_trainer(**logged(tmp_path, callbacks=[summary])).fit(
        module, make_loader(), make_loader(16), ckpt_path=checkpoint, weights_only=True
    )
    assert len(module.losses) == 18
    facts = summary.facts
    assert facts is not None
    assert (facts.steps, facts.progress.seconds, facts.progress.samples, facts.progress.parts) == (24, 24.0, 192, 2)
    assert facts.progress.validating == 600.0  # the first hundred of them in the first part
    assert facts.losses == pytest.approx((sum(first.losses[:6]) / 6, sum(module.losses[-6:]) / 6))
    assert "24.0 s of training (8 samples/s), 10 min 0 s of validation, in 2 parts" in capsys.readouterr().out
    # who loads the checkpoint without the callback is not warned: warnings are errors here
    make_trainer(max_epochs=6).fit(Plain(), make_loader(), ckpt_path=checkpoint, weights_only=True)


def test_training_is_the_same_with_it_and_without(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [RunSummary()]):
        module = Scored()
        options = logged(tmp_path, callbacks=[DoRA(rank=2), *callbacks], accumulate_grad_batches=2)
        torch.manual_seed(0)
        make_trainer(**options).fit(module, make_loader(), make_loader(16))
        trained.append((module.losses, values(module), torch.get_rng_state()))
    (losses, weights, state), (losses_with, weights_with, state_with) = trained
    assert losses == losses_with
    assert all(torch.equal(weights_with[name], value) for name, value in weights.items())
    assert torch.equal(state, state_with)


def test_losses_of_accumulated_batches_are_whole(make_trainer: MakeTrainer) -> None:
    module, summary = Plain(), RunSummary()
    make_trainer(callbacks=[summary], accumulate_grad_batches=4).fit(module, make_loader())
    assert summary.facts is not None
    assert summary.facts.losses == pytest.approx((module.losses[0], module.losses[-1]))
    assert summary.facts.config is None
    assert summary.facts.adapters.trainable == BASE


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}, {"fast_dev_run": True, "logger": True}])
def test_without_a_run_folder_nothing_is_written(
    options: dict[str, Any],
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(callbacks=[RunSummary()], **options).fit(Plain(), make_loader())
    assert "Run summary" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_page_of_the_users_own_is_left_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("# My notes\n")
    with pytest.raises(UserWarning, match=r"summary\.md is no run summary and is left as it is"):
        make_trainer(**logged(tmp_path, callbacks=[RunSummary()])).fit(Scored(), make_loader(), make_loader(16))
    assert (tmp_path / "summary.md").read_text() == "# My notes\n"
    make_trainer(**logged(tmp_path, callbacks=[RunSummary(dirpath=str(tmp_path / "page"))])).fit(
        Scored(), make_loader(), make_loader(16)
    )
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"summary.md", "loss.png"}


def test_a_part_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("step,train/loss,val/loss\n0,5.0,\n1,4.0,\n1,,4.5\n2,3.0,\n3,9.0,\n3,,9.5\n")
    second.write_text("epoch,step,train/loss\n0,2,2.0\n1,3,1.0\n")
    tested = tmp_path / "tested.csv"
    tested.write_text("epoch,step,test/loss\n1,0,7.0\n")
    assert read_curves([first, second, tmp_path / "none.csv", tested]) == {
        "train/loss": {0: 5.0, 1: 4.0, 2: 2.0, 3: 1.0},
        "val/loss": {1: 4.5},
    }


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_llama: Path, commonsense_folder: Path, tmp_path: Path) -> Path:
    """Ten steps on the tiny model; evaluated before, tested and merged after."""
    checkpoint = {"save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    adapter = {"method": "dora", "rank": 4, "target_modules": ["q_proj", "down_proj"]}
    content = {
        "seed_everything": 1,
        "evaluate_before": True,
        "test_after": True,
        "resume": True,
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlama",
            "init_args": {
                "model_name_or_path": str(tiny_llama),
                "adapter": adapter,
                "task": {"class_path": "tasks.CommonsenseQA", "init_args": {"judge": "ranking"}},
                "judge_in_validation": True,
            },
        },
        "data": {
            "class_path": "datamodules.CommonsenseDataModule",
            "init_args": {"data_dir": str(commonsense_folder), "val_size": 8, "batch_size": 4, "template": "plain"},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": "runs",
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
                {"class_path": "dora_lightning.callbacks.MergeOnSave", "init_args": {"when": "fit_end"}},
            ],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_command_reports_once_after_testing(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli("fit", "--config", config)
    out, run = capsys.readouterr().out, tmp_path / "runs/version_0"
    assert out.count("Run summary") == out.count("Held-out results before -> after") == 1
    assert out.index("Accuracy (%)") < out.index("Held-out results") < out.index("Run summary")
    result = json.loads((run / "result.json").read_text())
    assert result.keys() == {"steps", "before", "after", "parameters", "seconds", "peak_memory_bytes"}
    page = page_of(run)
    scores = [name for name in result["after"] if name.startswith(("val/", "test/"))]
    assert any(name.startswith("test/") for name in scores)
    for name in scores:
        old = f"{result['before'][name]:.4g}" if name in result["before"] else ""
        assert page[name][:2] == [old, f"{result['after'][name]:.4g}"]
    # 64 + 48 wide layers of 32 and 48 inputs: magnitudes 32 twice, A 4 x (32 + 48), B 4 x (32 + 32), two layers
    assert result["parameters"]["trainable"] == 2 * (2 * 32 + 4 * (32 + 48) + 4 * (32 + 32))
    assert result["seconds"] > 0
    # what it says to type next does what it says
    commands = [line.split(": dora-lightning ")[1].split() for line in out.splitlines() if ": dora-lightning " in line]
    assert [words[0] for words in commands] == ["test", "generate"]
    assert commands[1][1] == "runs/version_0/merged"
    run_cli(*commands[0])
    assert "Accuracy (%)" in capsys.readouterr().out
    run_cli(*commands[1], "--prompt", "is it hot?", "--max_new_tokens", "2")


def test_one_that_the_config_has_is_the_one_and_it_can_be_left_out(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    own = {"class_path": "dora_lightning.callbacks.RunSummary", "init_args": {"plots": False}}
    content["trainer"]["callbacks"].insert(0, own)
    content["trainer"]["callbacks"].append({"class_path": "dora_lightning.callbacks.WeightDecomposition"})
    config.write_text(yaml.safe_dump(content | {"test_after": False}))
    run_cli("fit", "--config", config)
    assert capsys.readouterr().out.count("Run summary") == 1
    run = tmp_path / "runs/version_0"
    # though it comes before MergeOnSave
    assert "`runs/version_0/merged`" in (run / "summary.md").read_text()
    assert not list(run.glob("*.png"))
    own["init_args"]["plots"] = True
    config.write_text(yaml.safe_dump(content | {"test_after": False, "evaluate_before": False}))
    run_cli("fit", "--config", config)
    run = tmp_path / "runs/version_1"
    assert {path.name for path in run.glob("*.png")} == {"loss.png", "learning_pattern.png"}
    assert "![learning pattern](learning_pattern.png)" in (run / "summary.md").read_text()
    capsys.readouterr()

    config.write_text(yaml.safe_dump(content | {"test_after": False}))
    run_cli("fit", "--config", config, "--run_summary", "false")
    out, run = capsys.readouterr().out, tmp_path / "runs/version_2"
    assert "Run summary" not in out
    assert "Held-out results before -> after" in out
    assert "Run folder: runs/version_2" in out
    assert not (run / "summary.md").exists()
    assert json.loads((run / "result.json").read_text())["seconds"] > 0


# Two processes -------------------------------------------------------------------------------------------------------


def fit(folder: str, devices: int) -> None:
    summary = RunSummary(plots=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        max_epochs=2,
        logger=CSVLogger(folder, "", ""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DoRA(rank=2), summary],
    )
    module = Scored()
    trainer.fit(module, make_loader(), make_loader(16))
    assert summary.facts is not None
    found = {"losses": module.losses, "ends": summary.facts.losses, "memory": len(summary.facts.memory)}
    found |= {"samples": summary.facts.progress.samples, "groups": summary.facts.adapters.groups}
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.fixture
def two_processes(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What two processes have printed together, and what each has found."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_are_one_run(two_processes: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    out, ranks = two_processes
    assert out.count("Run summary") == out.count("Run folder:") == 1
    means = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert len(means) == 4
    for rank in ranks:
        assert rank["ends"] == pytest.approx([means[0], means[-1]])
        assert (rank["samples"], rank["memory"]) == (64, 2)
        assert rank["groups"] == {"magnitude": MAGNITUDES, "lora_A": A, "lora_B": B}
    assert page_of(tmp_path).keys() >= {"process 0", "process 1"}


if __name__ == "__main__":
    fit(sys.argv[1], devices=2)
