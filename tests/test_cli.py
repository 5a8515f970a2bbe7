"""The dora-lightning command: run folders, resuming, overrides, help, and one clear error for bad input."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import MakeLlama, RunCLI, boolq_row, write_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tiny_llama: Path, commonsense_folder: Path, tmp_path: Path) -> Path:
    """A config file for ten steps on the tiny model, with a checkpoint every two."""
    content = {
        "seed_everything": 1,
        "resume": True,
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlama",
            "init_args": {
                "model_name_or_path": str(tiny_llama),
                "adapter": {"method": "dora", "rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {"class_path": "dora_lightning.training.WarmupDecay", "init_args": {"warmup": 2}},
                "task": {"class_path": "tasks.CommonsenseQA", "init_args": {"judge": "both", "max_new_tokens": 4}},
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
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 2},
                }
            ],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def fitted(run_cli: RunCLI, config: Path, tmp_path: Path) -> Path:
    """The run folder of a finished fit."""
    run_cli("fit", "--config", config)
    return tmp_path / "runs" / "version_0"


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def read_losses(run: Path) -> list[str]:
    """The logged training losses, over the parts of a run that was resumed."""
    rows: dict[int, str] = {}
    for table in sorted(run.glob("metrics_*/metrics.csv")):
        lines = [line.split(",") for line in table.read_text().splitlines()]
        header = lines[0]
        for line in lines[1:]:
            if line[header.index("train/loss")]:
                rows[int(line[header.index("step")])] = line[header.index("train/loss")]
    return [rows[step] for step in sorted(rows)]


def outcome_of(run: Path) -> dict[str, Any]:
    """The run's result, but for time and memory, which no two runs share."""
    result = json.loads((run / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in ("seconds", "peak_memory_bytes")}


def fails(run_cli: RunCLI, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Message of a run that must end with one error and exit code 1."""
    with pytest.raises(SystemExit) as caught:
        run_cli(*args)
    # the interpreter prints a text to standard error and exits with 1
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("dora-lightning: error: ")
    assert "Traceback" not in caught.value.code + capsys.readouterr().err
    assert "\nthe whole traceback: " in caught.value.code
    return caught.value.code.removeprefix("dora-lightning: error: ")


# Runs ----------------------------------------------------------------------------------------------------------------


def test_fit_leaves_a_run_folder_and_the_next_makes_another(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli("fit", "--config", config)
    fitted = tmp_path / "runs/version_0"
    result = json.loads((fitted / "result.json").read_text())
    assert result["steps"] == 10
    assert result["after"]["val/loss"] > 0
    assert (fitted / "config.yaml").is_file()
    assert list(fitted.glob("events.out.tfevents.*"))
    assert len(read_losses(fitted)) == 10
    assert "Run folder: runs/version_0" in capsys.readouterr().out
    run_cli("fit", "--config", config)
    second = fitted.with_name("version_1")
    assert read_losses(second) == read_losses(fitted)
    assert outcome_of(second) == outcome_of(fitted)


def test_the_saved_config_repeats_the_run(fitted: Path, run_cli: RunCLI) -> None:
    run_cli("fit", "--config", fitted / "config.yaml")
    assert read_losses(fitted.with_name("version_1")) == read_losses(fitted)


def test_evaluation_before_and_after(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli("fit", "--config", config, "--evaluate_before", "true", "--model.init_args.judge_in_validation", "true")
    result = json.loads((tmp_path / "runs/version_0/result.json").read_text())
    assert result["before"] == json.loads((tmp_path / "runs/version_0/before.json").read_text())
    assert result["after"]["val/loss"] < result["before"]["val/loss"]
    out = capsys.readouterr().out
    assert "Held-out results before -> after" in out
    for source in ("boolq", "mean"):
        old, new = (100 * result[when][f"val/{source}/ranking"] for when in ("before", "after"))
        assert f"{old:.1f} -> {new:.1f}" in out
    assert f"loss {result['before']['val/loss']:.3f} -> {result['after']['val/loss']:.3f}" in out


class KilledError(RuntimeError):
    pass


def test_an_interrupted_run_resumes_to_the_same_numbers(
    fitted: Path, run_cli: RunCLI, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_lightning.backbones import DoRALlama

    root = config.parent / "again"
    root_option = ("--trainer.default_root_dir", root)
    step = DoRALlama.training_step

    def killed(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 7:
            raise KilledError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DoRALlama, "training_step", killed)
        # a bug is no bad input: its traceback is shown
        with pytest.raises(KilledError):
            run_cli("fit", "--config", config, *root_option)
    assert not (root / "version_0" / "result.json").exists()
    # a start that fails, and a test of what there is, come between
    with pytest.raises(SystemExit):
        run_cli(
            "fit",
            "--config",
            config,
            *root_option,
            "--model.init_args.adapter.target_modules",
            "[none]",
            "--resume=false",
        )
    run_cli("test", "--config", config, *root_option, "--ckpt_path", checkpoint_of(root / "version_0"))
    run_cli("fit", "--config", config, *root_option)
    assert read_losses(root / "version_0") == read_losses(fitted)
    assert len(list((root / "version_0").glob("metrics_*"))) == 2
    assert outcome_of(root / "version_0") == outcome_of(fitted)
    weights = [torch.load(checkpoint_of(run), weights_only=True)["state_dict"] for run in (fitted, root / "version_0")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_a_run_that_died_before_its_result_has_its_scores_when_it_is_resumed(
    fitted: Path, run_cli: RunCLI, config: Path
) -> None:
    first = outcome_of(fitted)
    (fitted / "result.json").unlink()
    run_cli("fit", "--config", config)
    again = outcome_of(fitted)
    assert again["steps"] == first["steps"]
    scores = {name: value for name, value in first["after"].items() if name.startswith("val/")}
    assert scores
    assert {name: again["after"][name] for name in scores} == pytest.approx(scores)


def test_resume_false_starts_anew(fitted: Path, run_cli: RunCLI, config: Path) -> None:
    (fitted / "result.json").unlink()
    run_cli("fit", "--config", config, "--resume", "false")
    assert (fitted.with_name("version_1") / "result.json").is_file()
    assert not (fitted / "result.json").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_outright_resumes(fitted: Path, config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dora_lightning", "fit", "--config", str(config)]
    command += ["--trainer.default_root_dir", "killed", "--trainer.max_epochs", "30"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: Any = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **options)
    last = tmp_path / "killed/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/version_0/result.json").exists()
    assert subprocess.run(command, check=False, **options).returncode == 0
    command[command.index("killed")] = "whole"
    assert subprocess.run(command, check=False, **options).returncode == 0
    runs = [tmp_path / name / "version_0" for name in ("killed", "whole")]
    assert len(list(runs[0].glob("metrics_*"))) == 2
    assert outcome_of(runs[0]) == outcome_of(runs[1])


@pytest.mark.slow
def test_two_processes(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dora_lightning"]
    options: Any = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
        "capture_output": True,
        "text": True,
    }
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [*command, "fit", "--config", str(config), "--evaluate_before", "true", *two],
        check=False,
        timeout=200,
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/version_0"
    assert json.loads((run / "result.json").read_text())["before"]["val/loss"] > 0
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    # an error on every process ends them all
    bad = ["--model.init_args.adapter.target_modules", "[none]", "--resume", "false"]
    done = subprocess.run([*command, "fit", "--config", str(config), *two, *bad], check=False, timeout=120, **options)
    assert done.returncode != 0
    assert "dora-lightning: error: target_modules: 'none' matches no module" in done.stderr
    assert "Traceback" not in done.stderr


def alive(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the first", "all"])
def test_sigterm_ends_two_processes(config: Path, tmp_path: Path, whom: str) -> None:
    command = [sys.executable, "-m", "dora_lightning", "fit", "--config", str(config)]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1000"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    last, deadline = tmp_path / "runs/version_0/checkpoints/last.ckpt", time.monotonic() + 300
    try:
        while not last.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert last.exists(), (tmp_path / "log").read_text()
        os.killpg(process.pid, signal.SIGTERM) if whom == "all" else process.terminate()
        assert process.wait(60) == 143, (tmp_path / "log").read_text()
        # nobody of its group is left
        deadline = time.monotonic() + 30
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Go on from the last checkpoint of runs/version_0 by: dora-lightning fit" in (tmp_path / "log").read_text()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_test_prints_and_writes_what_it_finds(
    fitted: Path, run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run_cli("test", "--config", fitted / "config.yaml", "--ckpt_path", checkpoint_of(fitted))
    out = capsys.readouterr().out
    assert "Accuracy (%)" in out
    assert "ARC-Easy" in out
    rows = (fitted.with_name("version_1") / "test_predictions.jsonl").read_text().splitlines()
    assert len(rows) == 9


def test_predict_writes_texts(fitted: Path, run_cli: RunCLI) -> None:
    run_cli("predict", "--config", fitted / "config.yaml", "--ckpt_path", checkpoint_of(fitted))
    rows = (fitted.with_name("version_1") / "predictions.jsonl").read_text().splitlines()
    assert [sorted(json.loads(row)) for row in rows] == [["output", "prompt", "source"]] * 9


def test_validate_reports_the_loss_of_the_fit(
    fitted: Path, run_cli: RunCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run_cli("validate", "--config", fitted / "config.yaml", "--ckpt_path", checkpoint_of(fitted))
    loss = json.loads((fitted / "result.json").read_text())["after"]["val/loss"]
    assert f"{loss:.4f}"[:5] in capsys.readouterr().out


def test_a_rate_given_beside_a_checkpoint_wins(
    fitted: Path, run_cli: RunCLI, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run_cli(
            "fit",
            *("--config", config),
            *("--ckpt_path", checkpoint_of(fitted)),
            *("--trainer.max_epochs", "2"),
            *("--model.init_args.optimizer.init_args.lr", "0.02"),
        )
    assert "The config overrides the checkpoint: lora_B.lr: 0.02 (checkpoint: 0.01)" in caplog.text
    checkpoint = torch.load(checkpoint_of(fitted.with_name("version_1")), weights_only=True)
    assert checkpoint["global_step"] == 20
    assert {group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {0.02}


# Help ----------------------------------------------------------------------------------------------------------------


def help_of(run_cli: RunCLI, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run_cli(*args)
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


def test_print_config_is_a_config(run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = yaml.safe_load(help_of(run_cli, capsys, "fit", "--config", str(config), "--print_config"))
    assert printed["model"]["init_args"]["adapter"]["rank"] == 4
    assert printed["model"]["init_args"]["adapter"]["dropout"] == 0.0
    model = printed["model"]["init_args"]["model_name_or_path"]
    assert printed["data"]["init_args"].get("tokenizer", model) == model


def undocumented(text: str) -> list[str]:
    """Options of a help text that say nothing but their type."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("  ") and line.strip().startswith("--"):
            blocks.append([line.strip()])
        elif blocks and line.startswith("   "):
            blocks[-1].append(line.strip())
        elif line.strip():
            blocks.append(["--section", "documented"]) if blocks else None
    bare = []
    for block in blocks:
        name, _, rest = " ".join(block).partition("  ")
        rest = " ".join([rest, *block[1:]]).strip()
        if not rest or rest.startswith(("(type:", "(required", "(default:", "(known")):
            bare.append(name)
    return bare


@pytest.mark.parametrize(
    "args",
    [
        ("fit", "--help"),
        ("test", "--help"),
        ("fit", "--model.help", "dora_lightning.backbones.DoRALlama"),
        ("fit", "--data.help", "datamodules.CommonsenseDataModule"),
        ("fit", "--data.help", "datamodules.EverydayDataModule"),
        ("merge", "--help"),
        ("generate", "--help"),
    ],
)
def test_every_option_has_a_help_text(
    run_cli: RunCLI, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    text = help_of(run_cli, capsys, *args)
    assert text.count("--") > 5
    assert undocumented(text) == []


def test_help_lists_the_verbs(run_cli: RunCLI, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"]):
        run_cli(*args)
        out = capsys.readouterr().out
        for verb in ("fit", "validate", "test", "predict", "merge", "generate"):
            assert f"\n  {verb}" in out
    run_cli("--version")
    assert capsys.readouterr().out.strip()


# Bad input -----------------------------------------------------------------------------------------------------------

TASK = "data/boolq/train.json"


def write_data(tmp_path: Path, text: str | None) -> None:
    write_rows(tmp_path / TASK, [boolq_row(number) for number in range(12)])
    write_rows(tmp_path / "data/boolq/test.json", [boolq_row(100)])
    if text is None:
        (tmp_path / TASK).unlink()
    else:
        (tmp_path / TASK).write_text(text)


NO_ANSWER = json.dumps([boolq_row(0), {k: v for k, v in boolq_row(1).items() if k != "answer"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "data/boolq/train.json: no such file"),
        ("", "data/boolq/train.json: the file is empty"),
        ('{"instruction": "a"}\n{"instruc', "data/boolq/train.json, line 1: field"),
        (json.dumps(boolq_row(0)) + '\n{"instruc', "data/boolq/train.json, line 2: broken JSON at column"),
        ("[" + json.dumps(boolq_row(0)) + ', {"instr', "data/boolq/train.json: broken JSON at line 1"),
        (NO_ANSWER, "data/boolq/train.json, row 2: field 'answer' is missing"),
    ],
)
def test_bad_data(
    run_cli: RunCLI,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    message: str,
) -> None:
    write_data(tmp_path, text)
    data = ["--data.init_args.data_dir", "data", "--data.init_args.train_tasks", "[boolq]"]
    assert message in fails(run_cli, capsys, "fit", "--config", config, *data)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.init_args.train_tasks", "[boolqq]"], "unknown task 'boolqq'. Did you mean 'boolq'?"),
        (["--data.init_args.data_dir", "nowhere"], "data_dir nowhere is not a folder"),
        (["--model.init_args.adapter.rank", "0"], "rank must be at least 1, found 0"),
        (["--model.init_args.adapter.target_modules", "[q_prj]"], "'q_prj' matches no module. Did you mean 'q_proj'?"),
        (["--model.init_args.model_name_or_path", "./nowhere"], "no model folder at nowhere"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt"),
        (["--trainer.accelerator", "warp"], "accelerator"),
    ],
)
def test_bad_options(
    run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    found = fails(run_cli, capsys, "fit", "--config", config, *options)
    assert message in found
    assert "Union" not in found


def test_bad_checkpoints(
    fitted: Path, run_cli: RunCLI, make_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint_of(fitted).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    test = ["test", "--config", fitted / "config.yaml"]
    assert "half.ckpt could not be read as a checkpoint" in fails(run_cli, capsys, *test, "--ckpt_path", "half.ckpt")
    other = make_llama(seed=1)
    change = ["--model.init_args.model_name_or_path", other]
    wrong = "the checkpoint was trained on another base model"
    assert wrong in fails(run_cli, capsys, *test, *change, "--ckpt_path", checkpoint_of(fitted))
    assert wrong in fails(run_cli, capsys, "merge", checkpoint_of(fitted), "merged", "--base", other)
    assert "half.ckpt could not be read" in fails(run_cli, capsys, "merge", "half.ckpt", "merged")
    assert "no checkpoint file at none.ckpt" in fails(run_cli, capsys, "merge", "none.ckpt", "merged")
    assert "half.ckpt could not be read" in fails(run_cli, capsys, "generate", "half.ckpt", "--prompt", "hi")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("fit", "--trainer.max_epoch", "3"),  # a beginning of max_epochs
        ("fit", "--trainer.max_epochz", "3"),
        ("fit", "--model.init_args.adapter.ranks", "3"),
        ("fit", "--data.init_args.batchsize", "3"),
        ("merge", "a.ckpt", "out", "--overwrit", "true"),
        ("generate", "model", "--propmt", "hi"),
    ],
)
def test_a_typo_in_an_option_is_fatal(
    run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_cli(*args, *(["--config", config] if args[0] == "fit" else []))
    assert caught.value.code == 2
    assert args[-2].rpartition(".")[2].lstrip("-") in capsys.readouterr().err


def test_a_typo_in_a_config_file_is_fatal(run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("max_epochs", "max_epoch"))
    with pytest.raises(SystemExit) as caught:
        run_cli("fit", "--config", config)
    assert caught.value.code == 2
    assert "max_epoch" in capsys.readouterr().err


def test_an_error_in_training_keeps_its_traceback_in_the_run_folder(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_lightning.backbones import DoRALlama

    def breaks(self: Any, batch: Any, batch_idx: int) -> Any:
        raise error

    monkeypatch.setattr(DoRALlama, "training_step", breaks)
    error: Exception = ValueError("too many values to unpack (expected 2)")  # a bug that looks like bad input
    message, _, kept = fails(run_cli, capsys, "fit", "--config", config).partition("\n")
    assert message == "too many values to unpack (expected 2)"
    assert kept == "the whole traceback: runs/version_0/traceback.txt"
    text = (tmp_path / "runs/version_0/traceback.txt").read_text()
    assert "in breaks" in text
    error = KeyError("a bug")
    with pytest.raises(KeyError):
        run_cli("fit", "--config", config, "--resume", "false")
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the whole traceback: ")]
    assert Path(note.removeprefix("the whole traceback: ")).read_text().count("KeyError: 'a bug'") == 1
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert fails(run_cli, capsys, "fit", "--config", config, "--resume", "false").startswith("out of memory on the GPU")


def test_nan_ends_a_run_without_a_result(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["--trainer.callbacks+", "dora_lightning.callbacks.MergeOnSave", "--trainer.callbacks.when", "fit_end"]
    rate = ["--model.init_args.optimizer.init_args.lr", "1e30", "--model.init_args.lr_scheduler", "null"]
    message = fails(run_cli, capsys, "fit", "--config", config, *rate, *merge)
    assert message.startswith("step 1 of epoch 0, learning rate 1e+30: the loss of batch 1 (samples: ")
    run = tmp_path / "runs/version_0"
    assert (run / "traceback.txt").is_file()
    assert not (run / "result.json").exists()
    assert not (run / "merged").exists()
    assert not list(run.rglob("*.ckpt"))


def test_json_of_results_is_json(tmp_path: Path) -> None:
    from dora_lightning.runs import write_result

    write_result(tmp_path, "result.json", {"after": {"val/loss": float("nan"), "val/perplexity": float("inf")}})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert read == {"after": {"val/loss": None, "val/perplexity": None}}


def test_scores_of_an_untrained_adapter_say_so(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = "the pretrained model with an untrained adapter"
    with pytest.warns(UserWarning, match=f"test without --ckpt_path: no checkpoint is loaded, .* {untrained}"):
        run_cli("test", "--config", config)
    assert untrained in capsys.readouterr().out
    lines = (tmp_path / "runs/version_0/test_predictions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["untrained_adapter"] is True for line in lines)
    with pytest.warns(UserWarning, match="validate without --ckpt_path"):
        run_cli("validate", "--config", config)


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_special_names_of_checkpoints_that_are_not_there(
    run_cli: RunCLI, config: Path, fitted: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    for name in ("last", "best", "hpc"):
        message = fails(run_cli, capsys, verb, "--config", config, "--ckpt_path", name)
        assert message.startswith(f"--ckpt_path {name}: ")
        assert "name the file, such as --ckpt_path runs/version_0/checkpoints/last.ckpt" in message


@pytest.mark.parametrize("dtype", ["float8", "bf16", "int8"])
def test_an_unknown_dtype_is_refused(
    run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    message = fails(run_cli, capsys, "fit", "--config", config, "--model.init_args.dtype", dtype)
    assert f"dtype must be one of auto, float32, bfloat16, float16, float64, got '{dtype}'" in message


def test_an_unknown_verb(run_cli: RunCLI) -> None:
    with pytest.raises(SystemExit, match="unknown verb 'fti'"):
        run_cli("fti")


def test_the_traceback_can_be_had(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at none\.ckpt"):
        run_cli("merge", "none.ckpt", "merged")


def test_an_error_names_its_process(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="dora-lightning: error in process 1: no checkpoint file"):
        run_cli("merge", "none.ckpt", "merged")


# Going on ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_its_last_checkpoint(
    run_cli: RunCLI,
    config: Path,
    commonsense_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.write_text(config.read_text().replace("save_top_k: 0", "save_top_k: -1"))
    run_cli("fit", "--config", config)
    run = tmp_path / "runs/version_0"
    (run / "result.json").unlink()
    checkpoint_of(run).unlink()
    for late in ("epoch=0-step=8.ckpt", "epoch=0-step=10.ckpt"):
        (run / "checkpoints" / late).unlink()
    first = (run / "config.yaml").read_text()
    # steps that were there before are not at the end of another number of steps
    message = fails(run_cli, capsys, "fit", "--config", config, "--trainer.max_steps", "5")
    assert "epoch=0-step=6.ckpt is at step 6, with 0 epochs done, and max_steps is 5: there is nothing left" in message
    adam = "--model.init_args.optimizer.class_path", "torch.optim.SGD"
    message = fails(run_cli, capsys, "fit", "--config", config, *adam)
    assert "epoch=0-step=6.ckpt holds the state of the optimizer AdamW, and the config asks for SGD" in message
    # as many rows in files of the same names, with other texts
    for file in commonsense_folder.glob("*/train.json"):
        (tmp_path / "flipped" / file.parent.name).mkdir(parents=True)
        text = file.read_text().replace("cold", "warm")
        (tmp_path / "flipped" / file.parent.name / "train.json").write_text(text)
    caplog.clear()
    options = ("--data.init_args.cutoff_len", "250", "--data.init_args.data_dir", "flipped")
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="training goes on with other samples"):
        run_cli("fit", "--config", config, *options)
    assert f"Resuming the interrupted run {run.relative_to(tmp_path)} from epoch=0-step=6.ckpt" in caplog.text
    assert "The config overrides the checkpoint: data.init_args.cutoff_len: 250 (checkpoint: 256)" in caplog.text
    assert json.loads((run / "result.json").read_text())["steps"] == 10
    # the config of each part is kept, the newest under the name that is used
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["cutoff_len"] == 250
    assert (run / "config_0.yaml").read_text() == first
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(
    fitted: Path, run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_of(fitted)
    content = torch.load(path, weights_only=True)
    # what ModelCheckpoint leaves out with save_weights_only
    torch.save({k: v for k, v in content.items() if k not in ("optimizer_states", "lr_schedulers", "loops")}, path)
    (fitted / "result.json").unlink()
    for given in ((), ("--ckpt_path", path)):
        message = fails(run_cli, capsys, "fit", "--config", config, *given)
        assert "last.ckpt holds weights alone" in message
        assert "save_weights_only" in message
    # it is good for all else
    run_cli("validate", "--config", fitted / "config.yaml", "--ckpt_path", path)


def test_a_flipped_byte_of_a_checkpoint_is_found_by_every_verb(
    fitted: Path, run_cli: RunCLI, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_of(fitted)
    state = torch.load(path, weights_only=True)["state_dict"]
    weight = next(value for name, value in state.items() if name.endswith("lora_B"))
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1] ^= 16
    path.write_bytes(content)
    (fitted / "result.json").unlink()
    for args in (
        ("fit", "--config", config),
        ("fit", "--config", config, "--ckpt_path", path),
        ("test", "--config", fitted / "config.yaml", "--ckpt_path", path),
        ("validate", "--config", fitted / "config.yaml", "--ckpt_path", path),
        ("merge", path, "merged"),
        ("generate", path, "--prompt", "hi"),
        ("analyze", path),
    ):
        assert "last.ckpt could not be read as a checkpoint: it is corrupt: the checksum" in fails(
            run_cli, capsys, *args
        )


def test_a_run_holds_its_folder_while_it_lives(
    run_cli: RunCLI, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_lightning.backbones import DoRALlama

    step, messages = DoRALlama.training_step, []

    def started_again(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:  # another command, while this one trains
            monkeypatch.setattr(DoRALlama, "training_step", step)
            messages.append(fails(run_cli, capsys, "fit", "--config", config))
            run_cli("fit", "--config", config, "--resume", "false")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DoRALlama, "training_step", started_again)
    run_cli("fit", "--config", config)
    assert f"runs/version_0 belongs to a run that is alive: process {os.getpid()} on " in messages[0]
    runs = [tmp_path / "runs" / f"version_{number}" for number in (0, 1)]
    assert read_losses(runs[0]) == read_losses(runs[1])
    assert outcome_of(runs[0]) == outcome_of(runs[1])


@pytest.mark.filterwarnings("ignore:test without --ckpt_path")
@pytest.mark.parametrize(
    ("hook", "verb"),
    [
        ("training_step", "fit"),
        ("validation_step", "fit"),
        ("test_step", "test"),
        ("test_step", "fit"),
        ("setup", "fit"),
    ],
)
def test_sigterm_ends_with_an_exit_code_and_says_how_to_go_on(
    run_cli: RunCLI,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    hook: str,
) -> None:
    from dora_lightning.backbones import DoRALlama

    last = {"test_step": 2, "setup": 1}.get(hook, 5)
    real, calls, handler = getattr(DoRALlama, hook), [], signal.getsignal(signal.SIGTERM)

    def stopped(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **named)

    options = ["--config", config, "--trainer.val_check_interval", "2", "--data.init_args.eval_batch_size", "2"]
    options += ["--test_after", str(hook == "test_step" and verb == "fit").lower(), "--resume", "false"]
    with monkeypatch.context() as patch:
        patch.setattr(DoRALlama, hook, stopped)
        with pytest.raises(SystemExit) as caught:
            run_cli(verb, *options)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    # it ended there: the step of the signal was the last
    assert len(calls) == last
    assert not (tmp_path / "runs/version_0/result.json").exists()
    line = next(line for line in capsys.readouterr().err.splitlines() if "stopped by SIGTERM" in line)
    _, _, command = line.partition(" by: dora-lightning ")
    assert "dora-lightning: stopped by SIGTERM. " in line
    if (verb, hook) == ("test", "test_step"):
        assert command.startswith("test --config")
        return
    assert command.startswith("fit --config")
    if hook == "setup":
        assert "No checkpoint was saved yet; start again by: " in line
        return
    assert "Go on from the last checkpoint of runs/version_0 by: " in line
    # and it does
    run_cli(*shlex.split(command))
    assert json.loads((tmp_path / "runs/version_0/result.json").read_text())["steps"] == 10
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
