"""The command on VL-BART: all eight tasks in one run, and moving shapes from the making of the videos to the test."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import RunCLI
from tiny_vl_bart import BART, TOWER, WORDS, save_bart
from vl_bart_example import C, write_tasks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no answer to train on.*:UserWarning",
    "ignore:.*number of training batches.*smaller than the logging interval.*:UserWarning",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))


def task(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"tasks.{name}", "init_args": options}


def config_of(model: Any, data: dict[str, Any], judge: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "seed_everything": 1,
        "test_after": True,
        "model": {
            "class_path": "dora_lightning.backbones.DoRAVLBart",
            "init_args": {
                "model_name_or_path": model,
                "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "task": judge,
                **options,
            },
        },
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
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


def test_all_eight_tasks_at_once(run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write_tasks(tmp_path / "data")
    for name in ("tvqa", "how2qa", "tvc", "yc2c"):  # VALUE hides the answers of its test splits
        folder = Path(tasks[name]["folder"], name)
        tasks[name]["test"] = str(next(path for path in folder.iterdir() if "_val" in path.name))
    captions = {"num_beams": 2, "max_new_tokens": 8}
    judge = task(
        "Mixed",
        tasks={
            "vqav2, gqa": task("VQA", max_new_tokens=5, variants={"vqav2": "vl_t5", "gqa": "label"}, picture=0),
            "nlvr2": task("NLVR"),
            "coco_captions": task("Captioning", **captions),
            "tvqa, how2qa": task("VideoQA", max_new_tokens=5),
            "tvc, yc2c": task("Captioning", **captions),
        },
    )
    model = {"language": str(save_bart(tmp_path / "bart")), "feature_dim": C}
    data = {"class_path": "datamodules.VLBartDataModule", "init_args": {"tasks": tasks, "batch_size": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_of(model, data, judge)))
    run_cli("fit", "--config", tmp_path / "run.yaml")

    run = tmp_path / "runs" / "version_0"
    after = json.loads((run / "result.json").read_text())["after"]
    headlines = {"vqav2": "accuracy", "gqa": "accuracy", "nlvr2": "accuracy", "tvqa": "accuracy", "how2qa": "accuracy"}
    headlines |= dict.fromkeys(("coco_captions", "tvc", "yc2c"), "cider_d")
    found = [after[f"test/{source}/{measure}"] for source, measure in headlines.items()]
    assert after["test/mean/headline"] == pytest.approx(sum(found) / 8, abs=1e-6)
    assert "tvc" in capsys.readouterr().out

    records = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    rows = Counter(record["source"] for record in records)
    assert rows == {"vqav2": 5, "gqa": 4, "nlvr2": 4, "coco_captions": 2, "tvqa": 3, "how2qa": 3, "tvc": 3, "yc2c": 3}
    # each server's file, of as many rows
    for name in ("vqav2_submission.json", "gqa_submission.json", "captions_coco_captions_results.json"):
        source = name.removeprefix("captions_").partition("_submission")[0].removesuffix("_results.json")
        assert len(json.loads((run / name).read_text())) == rows[source]
    for source in ("tvqa", "how2qa"):
        answers = json.loads((run / f"{source}_submission.json").read_text())
        assert len(answers) == rows[source]
        assert all(isinstance(answer, int) for answer in answers.values())
    for source in ("tvc", "yc2c"):
        lines = (run / f"{source}_submission.jsonl").read_text().splitlines()
        assert [list(json.loads(line)["descs"][0]) for line in lines] == [["desc"]] * rows[source]
    with (run / "nlvr2_predictions.csv").open() as file:
        assert {answer for _, answer in csv.reader(file)} <= {"True", "False"}

    merged_model_answers_as_the_adapter(run)


def merged_model_answers_as_the_adapter(run: Path) -> None:
    from dora_lightning.backbones import DoRAVLBart
    from dora_lightning.vl_bart import VLBart

    live = DoRAVLBart.load_from_checkpoint(
        run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    ).eval()
    merged = VLBart.from_pretrained(run / "merged").eval()
    width = merged.config.feature_dim
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(4).expand(2, -1)
    inputs = {
        "input_ids": torch.randint(5, 200, (2, 6), generator=generator),
        "attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "decoder_input_ids": torch.randint(5, 200, (2, 3), generator=generator),
    }
    if merged.vision_tower is None:
        inputs["features"] = torch.randn(2, 4, width, generator=generator)
        inputs |= {"image_order": order * 0, "object_order": order, "visual_mask": torch.ones_like(order)}
    else:
        size = merged.vision_tower.image_size
        inputs["pixel_values"] = torch.randn(4, 3, size, size, generator=generator)
        inputs["image_counts"] = torch.tensor([2, 2])
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, live.language_model(**inputs).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tower", ["transformer", "resnet"])
def test_moving_shapes(run_cli: RunCLI, tmp_path: Path, tower: str) -> None:
    pytest.importorskip("av")
    resnet = {"embed_dim": 16, "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    model = {
        "language": BART,
        "tokenizer": WORDS,
        "vision": {"config": TOWER, "features": "pooled"} if tower == "transformer" else {"config": resnet},
        "image_orders": 8,
    }
    data = {
        "class_path": "datamodules.MovingShapesDataModule",
        "init_args": {"train_videos": 12, "val_videos": 3, "test_videos": 6, "batch_size": 4},
    }
    also = ["visual_embedding", "biases", "layer_norms", "embeddings", "vision_tower"]
    config = config_of(model, data, task("VQA", max_new_tokens=4, picture=0), also_trained=also)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run_cli("fit", "--config", tmp_path / "run.yaml")
    run = tmp_path / "runs" / "version_0"
    records = [json.loads(line) for line in (run / "test_predictions.jsonl").read_text().splitlines()]
    kinds = Counter(record["source"].removeprefix("moving_shapes_") for record in records)
    # four videos of one shape, of which either the shape or the color is asked, and two of two shapes
    assert kinds["color"] + kinds["shape"] == 4 + 2 * 2
    expected = {"direction": 4, "first": 2, "direction_shuffled": 8, "first_shuffled": 4}
    assert {kind: kinds[kind] for kind in expected} == expected
    after = json.loads((run / "result.json").read_text())["after"]
    assert {f"test/moving_shapes_{kind}/accuracy" for kind in kinds} <= after.keys()
    merged_model_answers_as_the_adapter(run)
