"""Data sets of the support matrix through the command, on small data in each set's own file format.

Others are elsewhere: commonsense in test_cli.py, easy-VQA in test_cli_llava.py, VL-BART's eight and moving shapes in
test_cli_vl_bart.py.
"""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import RunCLI, write_rows
from tiny_llava import save_image, save_llava

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*smaller than the logging interval.*:UserWarning", "ignore:.*were left out.*:UserWarning"
)


def config_of(backbone: str, model: Path, data: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "seed_everything": 1,
        "model": {
            "class_path": f"dora_lightning.backbones.{backbone}",
            "init_args": {
                "model_name_or_path": str(model),
                "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
                **options,
            },
        },
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": "runs",
        },
    }


def task(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"tasks.{name}", "init_args": options}


def datamodule(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"datamodules.{name}", "init_args": {"num_workers": 0, **options}}


def predictions(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("runs/version_*/test_predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def dump(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def visual_sets(folder: Path) -> dict[str, dict[str, str]]:
    """The seven sets of VQADataModule in their official files, two questions or rows each (POPE: in each category)."""
    images = folder / "images"
    images.mkdir(parents=True)
    names = ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"]
    for seed, name in enumerate([*names, "1.jpg", "2.jpg", "VizWiz_val_1.jpg", "VizWiz_val_2.jpg"]):
        save_image(images / name, seed, (20, 12))
    ten = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    vqa = [{"image_id": n, "question": "is it hot?", "question_id": 10 * n} for n in (1, 2)]
    truth = [{**row, "answers": ten, "multiple_choice_answer": "red"} for row in vqa]
    gqa = {str(n): {"imageId": str(n), "question": "is it hot?", "answer": "red"} for n in (1, 2)}
    vizwiz = [{"image": f"VizWiz_val_{n}.jpg", "question": "is it hot?", "answers": ten} for n in (1, 2)]
    words = ["red"] * 10
    texts = [{"image_id": str(n), "question": "is it hot?", "question_id": n, "answers": words} for n in (1, 2)]
    science = {"question": "is it hot?", "choices": ["yes", "no"], "answer": 0, "hint": "", "split": "test"}
    save_image_at = folder / "scienceqa" / "4" / "image.png"
    save_image_at.parent.mkdir(parents=True)
    picture = save_image(save_image_at, 9).read_bytes()
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": names[n - 1], "text": "Is there a cup in the image?", "label": "yes"}
            for n in (1, 2)
        ]
        path = folder / "pope" / f"coco_pope_{category}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = base64.b64encode(picture).decode()
    table = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n"
    table += f"7\tis it hot?\t\tyes\tno\tA\tocr\t{encoded}\n1000007\tis it hot?\t\tno\tyes\tB\tocr\t7\n"
    (folder / "mmbench.tsv").write_text(table)
    at = {"images": str(images)}
    return {
        "vqav2": {
            "questions": dump(folder / "q.json", {"data_subtype": "val2014", "questions": vqa}),
            "annotations": dump(folder / "a.json", {"data_subtype": "val2014", "annotations": truth}),
            **at,
        },
        "gqa": {"questions": dump(folder / "testdev_balanced_questions.json", gqa), **at},
        "vizwiz": {"questions": dump(folder / "val.json", vizwiz), **at},
        "scienceqa": {
            "questions": dump(folder / "pid_splits.json", {"test": ["4", "5"]}),
            "annotations": dump(
                folder / "problems.json", {"4": {**science, "image": "image.png"}, "5": {**science, "image": None}}
            ),
            "images": str(folder / "scienceqa"),
        },
        "textvqa": {
            "questions": dump(folder / "TextVQA_0.5.1_val.json", {"data": texts}),
            "ocr": dump(folder / "ocr.json", {"data": [{"image_id": str(n), "ocr_tokens": ["hot"]} for n in (1, 2)]}),
            **at,
        },
        "pope": {"questions": str(folder / "pope"), **at},
        "mmbench": {"questions": str(folder / "mmbench.tsv")},
    }


@pytest.mark.filterwarnings("ignore:test without --ckpt_path")
def test_the_seven_sets_of_visual_questions(run_cli: RunCLI, tmp_path: Path) -> None:
    llava = save_llava(tmp_path / "llava", max_position_embeddings=2048)
    data = datamodule("VQADataModule", datasets=visual_sets(tmp_path / "data"), eval_batch_size=4)
    config = config_of("DoRALlava", llava, data, task=task("VQA", judge="generation", max_new_tokens=2))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run_cli("test", "--config", tmp_path / "run.yaml")
    counts = Counter(record["source"] for record in predictions(tmp_path))
    pope = {f"pope_{category}": 2 for category in ("random", "popular", "adversarial")}
    assert counts == {**dict.fromkeys(("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "mmbench"), 2), **pope}


def fit_and_test(run_cli: RunCLI, folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    (folder / "run.yaml").write_text(yaml.safe_dump(config | {"test_after": "task" in config["model"]["init_args"]}))
    run_cli("fit", "--config", folder / "run.yaml")
    (result,) = folder.glob("runs/version_*/result.json")
    assert json.loads(result.read_text())["steps"] == 1
    return predictions(folder) if "task" in config["model"]["init_args"] else []


def test_conversations_about_images(run_cli: RunCLI, tmp_path: Path) -> None:
    llava = save_llava(tmp_path / "llava")
    save_image(tmp_path / "1.png", 0, (20, 12))
    turns = [{"from": "human", "value": "<image>\nis it hot?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": str(n), "image": "1.png", "conversations": turns} for n in range(6)]
    data = datamodule("LlavaInstructions", train_file=dump(tmp_path / "rows.json", rows), val_size=2, batch_size=2)
    config = config_of("DoRALlava", llava, data, task=task("VQA", max_new_tokens=2))
    assert len(fit_and_test(run_cli, tmp_path, config)) == 2
    assert list(tmp_path.glob("runs/version_0/examples.png"))  # as the guide to one's own images promises


def test_questions_about_videos(run_cli: RunCLI, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from dora_lightning.videos import write_video

    llava = save_llava(tmp_path / "llava", max_position_embeddings=1024)
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8), rate=4)
    row = {"vid_name": "a", "q": "is it hot?", "a0": "yes", "a1": "no", "a2": "red", "a3": "blue", "ts": "0.00-1.50"}
    files = {}
    for split in ("train", "validate", "test"):
        files[split] = str(tmp_path / f"{split}.jsonl")
        lines = [json.dumps({**row, "qid": n, "answer_idx": n % 4}) for n in range(4)]
        Path(files[split]).write_text("\n".join(lines) + "\n")
    where = {**files, "videos": str(videos), "use_subtitles": False}
    data = datamodule("VideoQADataModule", datasets={"how2qa": where}, frames=2, batch_size=2, cutoff_len=512)
    config = config_of("DoRALlava", llava, data, task=task("VideoQA", judge="ranking"))
    assert [record["source"] for record in fit_and_test(run_cli, tmp_path, config)] == ["how2qa"] * 4


TEXT_SETS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any] | None]] = {
    "InstructionDataModule": (
        "DoRALlama",
        [{"instruction": "Is it hot?", "input": "", "output": "yes"}] * 6,
        {"val_size": 2},
        task("InstructionTuning", max_new_tokens=2),
    ),
    "MathQADataModule": (
        "DoRALlama",
        [{"question": "What is 1 + 1?", "answer": "It is 2."}] * 8,
        {"train_size": 4, "held_out": 3, "test_size": 2, "val_size": 1},
        task("MathQA", max_new_tokens=2),
    ),
    "PreferenceDataModule": (
        "DoRALlamaDPO",
        [{"prompt": "Is it hot?", "chosen": "yes", "rejected": "no"}] * 6,
        {"val_size": 2, "template": "alpaca"},
        None,
    ),
}


@pytest.mark.parametrize("name", TEXT_SETS)
def test_sets_of_text(run_cli: RunCLI, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    backbone, rows, options, judge = TEXT_SETS[name]
    write_rows(tmp_path / "rows.json", rows)
    data = datamodule(name, train_file=str(tmp_path / "rows.json"), batch_size=2, **options)
    config = config_of(backbone, tiny_llama, data, **({"task": judge} if judge else {}))
    assert len(fit_and_test(run_cli, tmp_path, config)) == (2 if judge else 0)
