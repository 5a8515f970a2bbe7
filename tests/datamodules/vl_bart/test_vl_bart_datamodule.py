"""VL-BART's batches: one task each, its own size, targets by their scores, features and pixels as they lie in files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_vl_bart import TOWER, save_bart
from vl_bart_example import C, write_tasks

from datamodules import IGNORE, VLBartDataModule
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRAVLBart
from dora_lightning.data import OptimizerStep
from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.videos import write_video
from dora_lightning.vl_bart import VLBartParts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no answer to train on.*:UserWarning", "ignore:validate. rows without a target.*:UserWarning"
)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path_factory.getbasetemp() / "vl-bart-cache"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def ready(bart: Path, tasks: dict[str, dict[str, Any]], stage: str = "fit", **options: Any) -> VLBartDataModule:
    data = VLBartDataModule(VLBartParts(str(bart), feature_dim=C), tasks, **options)
    data.setup(stage)
    return data


def with_tower(bart: Path, **tower: Any) -> VLBartParts:
    return VLBartParts(str(bart), vision=OpenClipVision(config=TOWER, **tower))


def test_an_epoch_is_all_batches_of_all_tasks(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    sizes = {"vqav2": 3, "gqa": 2, "nlvr2": 1, "coco_captions": 4, "tvqa": 5, "how2qa": 4, "tvc": 4, "yc2c": 4}
    chosen = {name: given | ({"batch_size": sizes[name]} if sizes[name] != 4 else {}) for name, given in tasks.items()}
    data = ready(bart, chosen, batch_size=4)
    loader: Any = data.train_dataloader()
    batches = list(loader)
    sources = [{sample.source for sample in batch["samples"]} for batch in batches]
    assert all(len(names) == 1 for names in sources)
    names = [names.pop() for names in sources]
    rows = Counter(dict.fromkeys(names, 0))
    for name, batch in zip(names, batches, strict=True):
        assert len(batch["samples"]) == sizes[name]
        rows[name] += sizes[name]
    # rows of each, filled up to whole batches: 4 (and an empty one), 4, 4, 10; 6 questions; 12 and 6 captions
    whole = {"vqav2": 4, "gqa": 4, "nlvr2": 4, "coco_captions": 10, "tvqa": 6, "how2qa": 6, "tvc": 12, "yc2c": 6}
    assert {name: -(-count // sizes[name]) for name, count in whole.items()} == Counter(names)
    assert names != sorted(names)
    loader.sampler.set_epoch(1)
    again = [batch["samples"][0].source for batch in loader]
    assert Counter(again) == Counter(names)
    assert again != names


def test_evaluation_is_every_row_once_in_batches_of_one_task(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    data = ready(bart, tasks, "test", eval_batch_size=3)
    batches = list(data.test_dataloader())
    assert all(len({sample.source for sample in batch["samples"]}) == 1 for batch in batches)
    rows = Counter(sample.source for batch in batches for sample in batch["samples"])
    assert rows == {"vqav2": 5, "gqa": 4, "nlvr2": 4, "coco_captions": 2, "tvqa": 3, "how2qa": 3, "tvc": 3, "yc2c": 3}


def test_features_lie_as_they_are_published(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    import h5py

    data = ready(bart, {"nlvr2": tasks["nlvr2"]}, "test", eval_batch_size=2)
    batch = next(iter(data.test_dataloader()))
    vision = batch["vision"]
    assert vision["features"].shape == (2, 72, C)  # two images of 36 rows
    assert vision["image_order"].tolist() == [[0] * 36 + [1] * 36] * 2
    assert vision["object_order"].tolist() == [[*range(36), *range(36)]] * 2
    assert vision["visual_mask"].sum() == 144
    name = batch["samples"][0].images[1]
    with h5py.File(Path(tasks["nlvr2"]["features"], f"{name}.h5")) as file:
        grid = torch.from_numpy(file[f"{name}/features"][()]).T.reshape(C, 7, 7)
    pooled = F.adaptive_max_pool2d(grid, (6, 6)).flatten(1).T
    torch.testing.assert_close(vision["features"][0, 36:], pooled)

    data = ready(bart, {"tvqa": tasks["tvqa"]}, "test")
    batch = next(iter(data.test_dataloader()))
    assert batch["vision"]["features"].shape[1:] == (64, C)
    assert batch["vision"]["image_order"].max() == 0
    assert batch["vision"]["object_order"][0].tolist() == list(range(64))
    for row, sample in enumerate(batch["samples"]):
        stored = torch.from_numpy(np.load(Path(tasks["tvqa"]["features"], f"{sample.images[0]}.npz"))["features"])
        index = batch["vision"]["visual_index"][row] if "visual_index" in batch["vision"] else row
        found = batch["vision"]["features"][index].double()
        if len(stored) <= 64:  # zeros, which are not masked as published
            torch.testing.assert_close(found[: len(stored)], stored, atol=1e-6, rtol=1e-6)
            assert found[len(stored) :].abs().max() == 0
        else:
            torch.testing.assert_close(found, F.adaptive_max_pool1d(stored.T, 64).T, atol=1e-6, rtol=1e-6)
    assert batch["vision"]["visual_mask"].min() == 1

    data = ready(bart, {"tvqa": tasks["tvqa"] | {"video_rows": None}}, "test")
    vision = next(iter(data.test_dataloader()))["vision"]
    assert vision["visual_mask"].min() == 0  # videos of other lengths


def test_what_several_rows_look_at_is_read_once(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    data = ready(bart, {"gqa": tasks["gqa"]}, "test", eval_batch_size=4)
    batch = next(iter(data.test_dataloader()))
    images = [sample.images[0] for sample in batch["samples"]]
    assert len(batch["vision"]["features"]) == len(set(images)) == 2
    index = batch["vision"]["visual_index"].tolist()
    assert [images.index(image) for image in images] == [index.index(place) for place in index]


def test_rows_about_one_image_are_drawn_together(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    data = ready(bart, {"gqa": tasks["gqa"]}, share_visuals=True, batch_size=1)
    batches = list(data.train_dataloader())
    assert [len(batch["samples"]) for batch in batches] == [2, 2]
    assert all(len(batch["vision"]["features"]) == 1 for batch in batches)


def test_targets_are_drawn_by_their_scores(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    data = ready(bart, {"vqav2": tasks["vqav2"]}, batch_size=4)
    loader: Any = data.train_dataloader()
    assert data.tokenizer is not None
    drawn: Counter[tuple[str, float]] = Counter()
    first: dict[int, list[str]] = {}
    for epoch in range(400):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for sample, labels, weight in zip(batch["samples"], batch["labels"], batch["row_weights"], strict=True):
                if sample.row["question_id"] % 2 == 0:
                    continue  # one answer
                text = data.tokenizer.decode([t for t in labels.tolist() if t >= 0], skip_special_tokens=True)
                drawn[text.partition(" ")[0] if text.startswith("dark") else "plain", round(float(weight), 2)] += 1
                first.setdefault(epoch, []).append(text)
    # answers with scores 0.3 and 0.9: the score is the weight, and the odds are one to three
    assert set(drawn) == {("dark", 0.3), ("plain", 0.9)}
    share = drawn["dark", 0.3] / sum(drawn.values())
    assert abs(share - 0.25) < 0.05
    # the same epoch draws the same, whatever was drawn between
    loader.sampler.set_epoch(3)
    again = [
        data.tokenizer.decode([t for t in labels.tolist() if t >= 0], skip_special_tokens=True)
        for batch in loader
        for sample, labels in zip(batch["samples"], batch["labels"], strict=True)
        if sample.row["question_id"] % 2
    ]
    assert again == first[3]


@pytest.mark.parametrize("share_visuals", [False, True])
def test_what_is_trained_on_is_counted_before_it_is_drawn(
    bart: Path, tasks: dict[str, dict[str, Any]], share_visuals: bool
) -> None:
    data = ready(bart, tasks, batch_size=2, share_visuals=share_visuals)
    loader: Any = data.train_dataloader()
    counts = set()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            supervised = batch["labels"] != IGNORE
            rows = "row_weights" in batch
            count = int(supervised.any(dim=1).sum() if rows else supervised.sum())
            assert batch["step"] == OptimizerStep(count, count, batches=1, replicas=1, ends=True)
            counts.add((rows, count))
    assert {rows for rows, _ in counts} == {False, True}
    assert len({count for rows, count in counts if not rows}) > 2


def test_evaluation_takes_the_best_target(bart: Path, tasks: dict[str, dict[str, Any]]) -> None:
    data = ready(bart, {"vqav2": tasks["vqav2"]}, "validate")
    assert data.tokenizer is not None
    assert (data.train_collator().draw, data.collator().draw) == (True, False)
    best = {
        row.row["question_id"]: max((score, text) for text, score in row.answers)[1]
        for row in data.asked("validate")
        if row.answers
    }
    several = [row for row in data.asked("validate") if len({score for _, score in row.answers}) > 1]
    assert several
    for batch in data.val_dataloader():
        for sample, labels in zip(batch["samples"], batch["labels"].tolist(), strict=True):
            if sample.row["question_id"] not in best:
                continue
            assert sample.target == best[sample.row["question_id"]]
            written = data.tokenizer.decode([token for token in labels if token >= 0], skip_special_tokens=True)
            assert sample.target.startswith(written)  # which may be cut
            assert written


class Seen(Callback):
    """Writes down what each training batch was."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch["samples"][0].source, batch["labels"].tolist(), batch["input_ids"].tolist()))


def test_going_on_in_the_middle_of_an_epoch(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def fit(checkpoint: Path | None) -> list[Any]:
        parts = VLBartParts(str(bart), feature_dim=C)
        data = VLBartDataModule(parts, {name: tasks[name] for name in ("vqav2", "coco_captions", "tvqa")}, 3)
        seen = Seen()
        every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[seen, every],
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        options: Any = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
        trainer.fit(DoRAVLBart(parts, AdapterConfig(rank=2, target_modules=["q_proj"])), datamodule=data, **options)
        return seen.batches

    whole = fit(None)
    assert len(whole) == 2 * 8
    for stop in (11, 3):  # the first of its own run, since a run writes those after it anew
        assert fit(tmp_path / f"step={stop}.ckpt") == whole[stop:]


def test_pixels_of_images(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    from image_examples import write_images

    questions = Path(tasks["vqav2"]["folder"])
    files = [json.loads(path.read_text()) for path in questions.glob("karpathy_*.json")]
    ids = {row["img_id"] for rows in files for row in rows}
    write_images(tmp_path / "val2014", sorted(ids))
    task = {"folder": str(questions), "images": str(tmp_path)}
    data = VLBartDataModule(with_tower(bart), {"vqav2": task}, eval_batch_size=4)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    pixels = batch["vision"]["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    assert batch["vision"]["image_counts"].tolist() == [1, 1]
    path = next(tmp_path.rglob(f"{batch['samples'][0].images[0]}.jpg"))
    resized = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    scaled = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255.0
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (scaled - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(pixels[batch["vision"]["visual_index"][0]], expected)

    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"vqav2, question \d+: .*cannot be decoded"):
        list(data.test_dataloader())
    broken = VLBartDataModule(with_tower(bart), {"vqav2": task}, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"3 of 5 samples were skipped for what they look at"):
        broken.setup("test")
    path.unlink()
    with pytest.raises(ValueError, match=rf"no image '{path.stem}' in {tmp_path}"):
        VLBartDataModule(with_tower(bart), {"vqav2": task}).setup("test")


def test_frames_of_videos(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    videos = {
        json.loads(line)["vid_name"]
        for path in Path(tasks["how2qa"]["folder"], "how2qa").iterdir()
        for line in path.read_text().splitlines()
    }
    for number, name in enumerate(sorted(videos)):
        frames = [np.full((32, 32, 3), 20 * place, np.uint8) for place in range(8 + number % 2)]
        write_video(tmp_path / f"{name}.mp4", frames, rate=2.0)
    task = {"folder": tasks["how2qa"]["folder"], "videos": str(tmp_path), "every": 1.0}
    data = VLBartDataModule(with_tower(bart, features="pooled"), {"how2qa": task}, keep_pixels=True)
    data.setup("test")
    vision = next(iter(data.test_dataloader()))["vision"]
    counts = vision["image_counts"].tolist()
    assert set(counts) <= {4, 5}  # of 4 and 4.5 seconds
    first = vision["pixel_values"][: counts[0]].mean((1, 2, 3))
    assert (first.diff() > 0).all()  # brighter and brighter
    for path in tmp_path.iterdir():
        path.unlink()
    assert next(iter(data.test_dataloader()))["vision"]["image_counts"].tolist() == counts  # kept
    (tmp_path / f"{min(videos)}.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"how2qa.*"):
        VLBartDataModule(with_tower(bart, features="pooled"), {"how2qa": task}).setup("fit")


@pytest.mark.parametrize(
    ("tasks_of", "message"),
    [
        (lambda given: {}, "name at least one of vqav2, gqa"),
        (lambda given: {"vqa2": given["vqav2"]}, r"unknown task 'vqa2'\. Did you mean 'vqav2'\?"),
        (
            lambda given: {"vqav2": given["vqav2"] | {"foldr": "x"}},
            r"vqav2: unknown option 'foldr'\. Did you mean 'folder'",
        ),
        (lambda given: {"vqav2": given["vqav2"] | {"videos": "x"}}, "vqav2: unknown option 'videos'"),
        (lambda given: {"tvqa": given["tvqa"] | {"grid_rows": 36}}, "tvqa: unknown option 'grid_rows'"),
        (lambda given: {"vqav2": {"features": given["vqav2"]["features"]}}, "vqav2: folder is missing"),
        (lambda given: {"tvqa": given["tvqa"] | {"every": 2.0}}, "tvqa: features were computed of frames already"),
    ],
)
def test_wrong_options(bart: Path, tasks: dict[str, dict[str, Any]], tasks_of: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLBartDataModule(str(bart), tasks_of(tasks))


def test_missing_features(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tasks: gqa: features: no such folder"):
        VLBartDataModule(str(bart), {"gqa": tasks["gqa"] | {"features": str(tmp_path / "none")}})
    kept = sorted(Path(tasks["gqa"]["features"]).iterdir())
    for path in kept:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    testdev = [path for path in kept if path.name.startswith("n")]
    (tmp_path / testdev[0].name).unlink()
    lacking = {"gqa": tasks["gqa"] | {"features": str(tmp_path)}}
    with pytest.raises(ValueError, match=rf"gqa, question 0{testdev[0].stem[1:]}0: no features of '{testdev[0].stem}'"):
        ready(bart, lacking, "test")
    with pytest.warns(UserWarning, match=r"2 of 4 samples were skipped for what they look at; the first: gqa"):
        ready(bart, lacking, "test", on_bad_row="skip")


def test_a_model_that_cannot_look(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    pixels = {"gqa": {"folder": tasks["gqa"]["folder"], "images": str(tmp_path)}}
    with pytest.raises(ValueError, match="gqa: the model has no vision tower"):
        VLBartDataModule(str(bart), pixels).setup("test")
    with pytest.raises(ValueError, match="gqa: the model computes features by its own vision tower"):
        VLBartDataModule(with_tower(bart), {"gqa": tasks["gqa"]}).setup("test")


def write_clips(tasks: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """A video of two seconds for each id of TVQA."""
    lines = [line for path in Path(tasks["tvqa"]["folder"], "tvqa").iterdir() for line in path.read_text().splitlines()]
    paths = [folder / f"{name}.mp4" for name in sorted({json.loads(line)["vid_name"] for line in lines})]
    noise = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    for path in paths:
        write_video(path, noise, rate=8.0)
    return paths


@pytest.mark.parametrize("fault", ["truncated", "no video", "empty", "missing"])
def test_videos_that_cannot_be_read(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path, fault: str) -> None:
    paths = write_clips(tasks, tmp_path)
    whole = paths[0].read_bytes()
    # the index is at the end of the file, the data before it
    contents = {"truncated": whole[: len(whole) // 2], "no video": b"something else", "empty": b""}
    paths[0].unlink()
    if fault != "missing":
        paths[0].write_bytes(contents[fault])
    options = {"tvqa": {"folder": tasks["tvqa"]["folder"], "videos": str(tmp_path), "every": 0.5}}
    model = with_tower(bart, features="pooled")
    with pytest.raises(ValueError, match=rf"tvqa.*{paths[0].stem}"):
        VLBartDataModule(model, options).setup("fit")
    data = VLBartDataModule(model, options, on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"2 of 6 samples were skipped for what they look at; the first: tvqa"):
        data.setup("fit")
    names = {sample.images[0] for batch in data.train_dataloader() for sample in batch["samples"]}
    assert names
    assert paths[0].stem not in names


def test_subtitles_that_are_missing(bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    said = Path(tasks["tvqa"]["folder"], "tv_subtitles.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(said[1:]) + "\n")
    lacking = tasks["tvqa"] | {"subtitles": str(tmp_path / "few.jsonl")}
    with pytest.raises(ValueError, match=r"tvqa_train\.jsonl, line 1: .*subtitles"):
        ready(bart, {"tvqa": lacking})
    with pytest.warns(UserWarning, match="subtitles"):
        data = ready(bart, {"tvqa": lacking | {"on_missing_subtitles": "empty"}})
    prompts = [sample.prompt for batch in data.train_dataloader() for sample in batch["samples"]]
    assert any(prompt.startswith("[Subs]  [Q]") for prompt in prompts)


def test_more_rows_of_features_than_the_model_tells_apart(
    bart: Path, tasks: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    names = {path.stem for path in Path(tasks["tvqa"]["features"]).iterdir()}
    for name in names:
        np.savez(tmp_path / f"{name}.npz", features=np.ones((101, C)))
    task = tasks["tvqa"] | {"features": str(tmp_path)}
    assert next(iter(ready(bart, {"tvqa": task}, "test").test_dataloader()))["vision"]["features"].shape[1] == 64
    whole = ready(bart, {"tvqa": task | {"video_rows": None}}, "test")
    with pytest.raises(ValueError, match=r"has 101 rows of features, and the model tells 100 apart \(object_orders\)"):
        next(iter(whole.test_dataloader()))
    (tmp_path / f"{min(names)}.npz").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="were skipped for what they look at"):
        ready(bart, {"tvqa": task}, "fit", on_bad_row="skip")


@pytest.mark.parametrize("size", ["40", 0, 2.5, True])
def test_batch_sizes_are_whole_numbers(bart: Path, tasks: dict[str, dict[str, Any]], size: Any) -> None:
    with pytest.raises(ValueError, match="tasks: gqa: batch_size must be a whole number of at least 1"):
        VLBartDataModule(str(bart), {"gqa": tasks["gqa"] | {"batch_size": size}})
