"""The command on a LLaVA put together from parts: trained, tested and drawn from one config, and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny import RunCLI
from tiny_llava import VISION
from transformers import AutoModelForImageTextToText


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    pytest.importorskip("easy_vqa")
    return {
        "seed_everything": 1,
        "test_after": True,
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlava",
            "init_args": {
                "model_name_or_path": {"language": str(tiny_llama), "vision": VISION | {"image_size": 64}},
                "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
                "vision_tower": "full",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "task": {"class_path": "tasks.VQA", "init_args": {"max_new_tokens": 4}},
            },
        },
        "data": {
            "class_path": "datamodules.EasyVQADataModule",
            "init_args": {"train_images": 8, "val_size": 12, "test_size": 40, "batch_size": 4, "eval_batch_size": 8},
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
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
                {"class_path": "dora_lightning.callbacks.MergeOnSave", "init_args": {"when": "fit_end"}},
            ],
        },
    }


@pytest.fixture
def run_fit(run_cli: RunCLI, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCLI:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))

    def run(*options: object) -> None:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        run_cli("fit", "--config", tmp_path / "run.yaml", *options)

    return run


@pytest.mark.filterwarnings("ignore")
def test_one_config_trains_tests_draws_and_merges(
    run_fit: RunCLI, run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fit()
    run = tmp_path / "runs" / "version_0"
    printed = capsys.readouterr().out
    for part in ("easy_vqa_shape", "easy_vqa_color", "easy_vqa_yes_no", "majority", "Run folder"):
        assert part in printed
    records = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    assert len(records) == 40
    assert Image.open(run / "examples.png").size[0] > 300
    result = json.loads((run / "result.json").read_text())
    assert {"val/loss", "test/easy_vqa/accuracy", "test/easy_vqa_shape/majority"} <= result["after"].keys()
    AutoModelForImageTextToText.from_pretrained(run / "merged")
    # the config that was saved, and the checkpoint, give the same answers again
    run_cli("test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    again = [json.loads(line) for line in next(tmp_path.glob("runs/version_1/test_predictions.jsonl")).open()]
    assert again == records


def test_testing_afterwards_needs_a_task(run_fit: RunCLI, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="test_after needs a task"):
        run_fit("--model.init_args.task", "null")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.init_args.vision_tower", "fine", "vision_tower"),
        ("--model.init_args.model_name_or_path.vision.patchsize", "3", "'patchsize' is no field of CLIPVisionConfig"),
        ("--model.init_args.feature_cache", "features", "feature_cache needs a frozen vision tower"),
        ("--data.init_args.image_aspect_ratio", "stretch", "image_aspect_ratio"),
    ],
)
def test_bad_input_is_one_message(
    run_fit: RunCLI, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_fit(option, value)
    assert message in f"{caught.value}{capsys.readouterr().err}"
